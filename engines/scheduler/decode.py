"""Which sequences take part in a decode worker's next step: continuous batching. Pure: no clock, no tensors, no I/O.

    add (with KV: arrived by a transfer) -----------------------> running --one token per step--> remove
    add (without) -> waiting --admit: prefix, all its blocks--> running --chunks, then tokens--> remove
    running --blocks ran out--> swapped (host memory) --blocks free again, before anybody waiting--> running
                            \\-> StepPlan.moved (another decode worker), StepPlan.preempted (the queue)
    Choices of the only request here are not sent away: the latest goes back to waiting until others have ended.

After Orca (OSDI 2022): sequences join and leave between steps; and Sarathi-Serve (OSDI 2024): decode rows first, what
is left of the token budget goes to chunks of prompts.
"""

from __future__ import annotations

from engines.scheduler.drafts import Drafts, Proposer
from engines.scheduler.fair_order import FairOrder
from engines.scheduler.itl_limits import ItlLimits
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.scheduler.policy import BlockAllocator, PrefixLookup
from engines.scheduler.sequence_blocks import SequenceBlocks
from engines.sequence import Sequence
from engines.swap.ladder import MAX_PREEMPTIONS, Ladder, Remedy
from engines.swap.swapped import BlockCopy, SwappedRequests


class DecodeScheduler:
    """Owned by the engine thread. Serves the roles `decode` and `both`.

    Args:
        max_num_seqs: sequences of one step, and those admitted at a time.
        max_num_batched_tokens: tokens of one step.
        watermark_blocks: blocks that admitting leaves free, so that growth does not preempt at once.
        proposer: guesses tokens for steps of at most `max_draft_seqs` sequences; None: nobody guesses.
        limits: keep steps short where an SLO asks for it; whoever runs the steps tells it of them.
        ladder: what becomes of a sequence when blocks run out; without one it is always released.
    """

    def __init__(
        self,
        pool: BlockAllocator,
        prefix_cache: PrefixLookup | None,
        block_size: int,
        *,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        watermark_blocks: int = 0,
        proposer: Proposer | None = None,
        max_draft_seqs: int = 8,
        limits: ItlLimits | None = None,
        ladder: Ladder | None = None,
    ) -> None:
        self._pool = pool
        self._blocks = SequenceBlocks(pool, prefix_cache, block_size)
        self._drafts: Drafts | None = None
        if proposer is not None:
            self._drafts = Drafts(
                proposer, self._blocks, max_num_seqs=max_draft_seqs, watermark_blocks=watermark_blocks
            )
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._watermark_blocks = watermark_blocks
        self._limits = limits
        self._order = FairOrder()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []  # in the order they joined
        self._step_id = 0
        self._lacks_blocks = False
        self._awaits_move = False
        self._ladder = ladder or Ladder(SwappedRequests(pool, block_size))
        self._swapped = self._ladder.swapped

    @property
    def step_id(self) -> int:
        return self._step_id

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._swapped)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Take a sequence. One that owns blocks has KV of its first `num_computed_tokens`: it joins the next step."""
        (self._running if sequence.block_table else self._waiting).append(sequence)
        self._lacks_blocks = self._awaits_move = False

    def remove(self, seq_id: tuple[str, int]) -> None:
        """Forget a sequence, wherever it is; safe to repeat. Its blocks stay its own: the caller frees them."""
        self._waiting = [sequence for sequence in self._waiting if sequence.seq_id != seq_id]
        self._running = [sequence for sequence in self._running if sequence.seq_id != seq_id]
        self._swapped.remove(seq_id)
        self._lacks_blocks = self._awaits_move = False

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None if there is nothing to do. A plan may be only about sequences that come or go."""
        step = _Step(self._num_tokens_allowed(), self._max_num_seqs)
        self._plan_running(step)
        if not step.dropped:  # who had to give blocks up shall not see them go to a newcomer in the same step
            self._bring_back(step)
            if not self._swapped:
                self._admit(now_s, step)
        self._awaits_move = bool(self._ladder.moving) and not step.items
        if not step.items and not step.dropped and not step.swapped_in:
            return None
        if self._drafts is not None:
            self._drafts.add_to(step.items, step.num_tokens_left)
        self._step_id += 1
        return StepPlan(
            self._step_id,
            tuple(step.items.values()),
            tuple(step.preempted),
            swapped_out=tuple(step.swapped_out),
            swapped_in=tuple(step.swapped_in),
            moved=tuple(step.moved),
        )

    def complete(self, plan: StepPlan, sampled: dict[tuple[str, int], list[int]]) -> None:
        """The step ran: advance its sequences. The ids of one with several choices are the caller's to fork."""
        for item in plan.scheduled:
            sequence, num_known = item.sequence, item.num_known_tokens
            sequence.num_computed_tokens = item.start + num_known
            is_done = sequence.num_computed_tokens == sequence.num_tokens
            if is_done and num_known > 1:
                self._blocks.remember(sequence)
            if is_done and sequence.num_samples == 1:
                ids = sampled.get(sequence.seq_id, [])
                sequence.output_token_ids.extend(ids)
                if item.draft and self._drafts is not None:
                    sequence.num_computed_tokens += len(ids) - 1  # guessed right: their KV is there
                    self._drafts.settle(item, len(ids))
        self._lacks_blocks = self._awaits_move = False

    def next_wakeup_s(self, now_s: float) -> float | None:
        """When `schedule` may have something without another call here; None: only after one."""
        if self._running and not self._awaits_move:
            return now_s
        if (self._waiting or self._swapped) and not self._lacks_blocks:
            return now_s
        return None

    # ---------------------------------------------------------------- running
    def _plan_running(self, step: _Step) -> None:
        waiting = [(sequence, sequence.num_uncomputed_tokens) for sequence in self._running]
        decoding = [each for each in waiting if each[1] == 1]
        chunked = [each for each in waiting if each[1] != 1]
        stuck: list[Sequence] = []
        for sequence, num_uncomputed in decoding + chunked:
            if step.is_full:
                break
            if step.dropped and sequence in step.dropped:
                continue
            if self._blocks.has_room(sequence) or self._grow_or_preempt(sequence, step):
                step.add(sequence, num_uncomputed)
            elif sequence not in step.dropped:
                stuck.append(sequence)
        if stuck and not step.items and not step.dropped and not self._ladder.moving:
            # Everybody is pinned and nobody can move: somebody has to go all the same.
            self._preempt(max(stuck, key=_lateness), step)

    def _grow_or_preempt(self, sequence: Sequence, step: _Step) -> bool:
        """Blocks for its next tokens; those of the latest arrived if there are no others. False if it cannot run."""
        while not self._blocks.grow(sequence):
            if self._ladder.moving:
                return False  # blocks are about to come back
            victims = [other for other in self._running if other.num_preemptions < MAX_PREEMPTIONS]
            if not victims:
                return False
            victim = max(victims, key=_lateness)
            if _lateness(victim) < _lateness(sequence):
                # Only earlier ones could give: a later one never takes from them. It waits if it is pinned itself.
                return False
            self._preempt(victim, step)
            if sequence in step.dropped:
                return False
        return True

    def _preempt(self, victim: Sequence, step: _Step) -> None:
        """Take the blocks of a request: all its choices go, since they go back to the queue together."""
        choices = [sequence for sequence in self._running if sequence.rid == victim.rid]
        if 1 < len(choices) == len(self._running):
            # It has the worker to itself: anywhere else it would run out again, and never end.
            latest = max(choices, key=_lateness)
            self._take_out(latest, step)
            self._blocks.take_back(latest)
            self._waiting.append(latest)
            return
        remedy = self._ladder.choose(choices)
        for sequence in choices:
            self._take_out(sequence, step)
        match remedy:
            case Remedy.SWAP:
                step.swapped_out.append(self._swapped.take(choices))
            case Remedy.MOVE:
                self._ladder.moving.add(victim.rid)
                step.moved += choices
            case Remedy.RELEASE:
                for sequence in choices:
                    self._blocks.take_back(sequence)
                step.preempted += choices
                self._waiting = [sequence for sequence in self._waiting if sequence.rid != victim.rid]

    def _take_out(self, sequence: Sequence, step: _Step) -> None:
        self._running.remove(sequence)
        sequence.num_preemptions += 1
        step.drop(sequence)

    # ---------------------------------------------------------------- swapped and waiting
    def _bring_back(self, step: _Step) -> None:
        """Swapped requests, the oldest first, with blocks to grow into. Nobody overtakes one that lacks them."""
        while not step.is_full and (oldest := self._swapped.oldest()) is not None:
            if self._running:
                spare = oldest.num_seqs + self._watermark_blocks
                if len(self._running) + oldest.num_seqs > self._max_num_seqs:
                    return
            else:
                # Several choices may never fit together: one of them then goes back to waiting, as in `_preempt`.
                spare = oldest.num_next_blocks if oldest.num_seqs == 1 else 0
            if oldest.num_blocks + spare > self._pool.num_free:
                self._lacks_blocks = True
                return
            sequences, copy = self._swapped.bring_back(oldest.rid)
            step.swapped_in.append(copy)
            self._running += sequences
            for sequence in sequences:
                if not step.is_full and self._blocks.grow(sequence):
                    step.add(sequence, sequence.num_uncomputed_tokens)

    def _admit(self, now_s: float, step: _Step) -> None:
        max_num_seqs = self._max_num_seqs if self._limits is None else self._limits.max_num_seqs
        for sequence in self._order.of(self._waiting, now_s):
            if step.is_full or len(self._running) >= max_num_seqs:
                return
            # With nobody running there is no growth to keep blocks for.
            watermark = self._watermark_blocks if self._running else 0
            if not self._blocks.admit(sequence, watermark_blocks=watermark):
                self._lacks_blocks = True
                return
            self._waiting.remove(sequence)
            self._running.append(sequence)
            num_uncomputed = sequence.num_uncomputed_tokens
            self._order.served(sequence, num_uncomputed)
            step.add(sequence, num_uncomputed)

    def _num_tokens_allowed(self) -> int:
        if self._limits is None:
            return self._max_num_batched_tokens
        return self._limits.max_num_tokens(sum(sequence.num_uncomputed_tokens == 1 for sequence in self._running))


class _Step:
    """A plan in the making. `dropped`: whose blocks are taken; `preempted`, `moved`: those that leave the scheduler."""

    def __init__(self, max_num_tokens: int, max_num_seqs: int) -> None:
        self.items: dict[tuple[str, int], ScheduledSequence] = {}
        self.preempted: list[Sequence] = []
        self.moved: list[Sequence] = []
        self.swapped_out: list[BlockCopy] = []
        self.swapped_in: list[BlockCopy] = []
        self.dropped: list[Sequence] = []
        self.num_tokens_left = max_num_tokens
        self._max_num_seqs = max_num_seqs

    @property
    def is_full(self) -> bool:
        return self.num_tokens_left <= 0 or len(self.items) >= self._max_num_seqs

    def add(self, sequence: Sequence, num_uncomputed: int) -> None:
        num_new_tokens = min(self.num_tokens_left, num_uncomputed)
        self.items[sequence.seq_id] = ScheduledSequence(sequence, sequence.num_computed_tokens, num_new_tokens)
        self.num_tokens_left -= num_new_tokens

    def drop(self, sequence: Sequence) -> None:
        item = self.items.pop(sequence.seq_id, None)
        if item is not None:
            self.num_tokens_left += item.num_new_tokens
        self.dropped.append(sequence)


def _lateness(sequence: Sequence) -> tuple[float, str, int]:
    return (sequence.arrival_s, sequence.rid, sequence.choice)
