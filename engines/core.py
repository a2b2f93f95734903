"""The engine: decides a step, runs it, moves KV, reports tokens. Single-threaded; knows no Redis, no Celery, no text.

    front messages --handle--> [ writer | reader | scheduler ] --step--> runner --> Tokens to the front
    kv events ------handle_kv-->

Roles differ only in what happens to a sequence when its prompt is computed: `prefill` hands it over, `both` keeps it.
A `decode` engine is a `both` engine that nobody sends prompts to; it still prefills, in chunks, whatever a recovered
sequence lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from engines import messages, outputs
from engines.dry_runs import DryRuns
from engines.early_arrivals import EarlyArrivals
from engines.errors import EngineError
from engines.figures import EngineFigures
from engines.finish import FinishRule
from engines.handoff_reader import HandoffReader
from engines.handoff_writer import HandoffWriter
from engines.intake import Intake
from engines.messages import EngineMessage, FrontMessage, TokenOut
from engines.prefetch import PrefixPrefetch
from engines.prefix_share import NoSharing
from engines.scheduler.control import StepControl
from engines.scheduler.plan import StepPlan
from engines.sequence import Sequence
from engines.swap.relief import Relief
from kvstore import transport as kv
from kvstore.state.entries import TokenLogprobs

if TYPE_CHECKING:
    from engines.runner import ModelRunner
    from engines.scheduler.scheduler import Scheduler
    from engines.step_rows import SampledTokens
    from engines.structured.compiler import GrammarCompiler
    from kvstore.blocks import BlockPool, PrefixCache
    from kvstore.clock import Clock
    from kvstore.tiers import TieredStore

STATS_S = 0.5
SUSPEND_AFTER_S = 5.0  # without a renewal that Redis answered: step no more, keep the KV
STALE_LEASE_S = 1.5
MAX_STALE_STEPS = 256  # and no more tokens per sequence than this into the front's buffer


class EngineCore:
    """Owned by the engine thread.

    Args:
        layer_group_bytes: layers are pushed in groups of about this many bytes (transfer.layer_group_bytes).
        control: how many sequences may decode together; grants are refused beyond it. Told of grants, too.
        watermark_blocks: blocks that granting leaves free, so that growth does not preempt at once.
        relief: copies to and from host memory; who is to be swapped or moved, the scheduler says.
        prefix_cache, tiers: for their hit rates, and so that a prefix on disk is brought near before it is scheduled.
        sharing: prefixes on their way between workers' caches.
        on_step: told of each step and its seconds.
    """

    def __init__(
        self,
        *,
        incarnation: str,
        scheduler: Scheduler,
        runner: ModelRunner,
        pool: BlockPool,
        node: kv.KVPort,
        finish_rule: FinishRule,
        relief: Relief,
        grammars: GrammarCompiler,
        send: Callable[[EngineMessage], None],
        clock: Clock,
        block_size: int,
        block_bytes: int,
        layer_group_bytes: int = 1 << 20,
        control: StepControl | None = None,
        watermark_blocks: int = 0,
        prefix_cache: PrefixCache | None = None,
        tiers: TieredStore | None = None,
        sharing: NoSharing | None = None,
        on_step: Callable[[StepPlan, float], None] | None = None,
    ) -> None:
        self._on_step = on_step
        self._scheduler = scheduler
        self._runner = runner
        self._pool = pool
        self._kv = node
        self._finish = finish_rule
        self._intake = Intake(
            max_model_len=finish_rule.max_model_len,
            vocab_size=runner.vocab_size,
            num_blocks=pool.num_blocks,
            block_size=block_size,
            clock=clock,
        )
        self._grammars = grammars
        self._send = send
        self._clock = clock
        self._block_size = block_size
        self._layer_bytes = block_bytes // node.num_layers
        self._layer_group_bytes = layer_group_bytes
        self._control = control or StepControl()
        self._watermark_blocks = watermark_blocks
        self._live: dict[tuple[str, int], Sequence] = {}
        self._stats_at_s = 0.0
        self._lease_s = clock()
        self._stale_steps = 0
        self._relief = relief
        self._figures = EngineFigures(pool, node, prefix_cache, tiers)
        self._sharing = sharing or NoSharing(node)
        self._prefetch = PrefixPrefetch(prefix_cache, tiers, clock)
        self._writer = HandoffWriter(
            node=node,
            pool=pool,
            block_size=block_size,
            block_bytes=block_bytes,
            incarnation=incarnation,
            send=send,
            schedule=self._start,
            unschedule=self._stop_sequence,
            clock=clock,
            pressure=self._control.pressure,
        )
        self._dry_runs = DryRuns(node=node, pool=pool, block_size=block_size, incarnation=incarnation, clock=clock)
        self._reader = HandoffReader(
            node=node,
            pool=pool,
            block_size=block_size,
            send=send,
            may_admit=self._may_admit,
            copy_blocks=runner.copy_blocks,
            clock=clock,
        )

    # ---------------------------------------------------------------- messages of the front
    def handle(self, message: FrontMessage) -> None:
        match message:
            case messages.Add():
                self._grammars.ask(message.params.constraint)
                self._sharing.added(message)
                self._add(message)
            case messages.Promote(rid, xfer, epoch, token):
                sequences = self._reader.promote(rid, xfer, epoch)
                self._sharing.promoted(xfer, sequences)
                self._promote(sequences, (epoch, token))
            case messages.Owner(rid, epoch, token):
                for sequence in self._choices_of(rid):
                    sequence.owner = (epoch, token)
            case messages.Drop(rid, xfer):
                self._drop(rid, xfer)
            case messages.Stop(rid, c):
                self._stop_choice(rid, c)
            case messages.Peers(targets, caches):
                self._sharing.meet(caches)
                self._dry_runs.meet(targets)
                self._meet(self._dry_runs.usable)
                self._writer.seek()
            case messages.Lease():
                self._lease_s, self._stale_steps = self._clock(), 0

    def _add(self, add: messages.Add) -> None:
        refusal = self._intake.refusal(add)
        if refusal is not None:
            self._send(refusal)
            return
        is_fresh = not any(add.choices)
        if add.mode == "local" and not (is_fresh and len(add.choices) > 1):
            for choice, ids in enumerate(add.choices):
                self._start_unless_finished(self._intake.sequence(add, choice, ids))
            return
        # One pass over what all choices share: the prompt, and for a single choice also its tokens so far.
        shared_ids = add.choices[0] if len(add.choices) == 1 else []
        sequence = self._intake.sequence(add, 0, shared_ids)
        sequence.num_samples = len(add.choices) if is_fresh or len(add.choices) == 1 else 0
        if add.mode == "push":
            num_tokens = len(add.prompt_ids) + len(shared_ids)
            num_blocks, room = self._intake.blocks_for(add, num_tokens), self._intake.room_for(add, num_tokens)
            self._writer.add(add, sequence, num_blocks=num_blocks, num_tokens=room)
        else:
            self._start(sequence)

    def _meet(self, targets: list[messages.Target]) -> None:
        self._writer.set_peers(targets)
        self._relief.ladder.has_peers = bool(targets)

    def _promote(self, sequences: list[Sequence], owner: tuple[int, str]) -> None:
        for sequence in sequences:
            sequence.owner = owner
            if sequence.wants_prompt_scores:  # a recovered request that lacks this choice: its prompt is computed again
                self._pool.free(sequence.block_table)
                sequence.block_table, sequence.num_computed_tokens = [], 0
            self._start_unless_finished(sequence)

    def _start_unless_finished(self, sequence: Sequence) -> None:
        """A choice that a former owner finished only needs its end told again."""
        finish = self._finish.of(sequence)
        if finish is None:
            self._start(sequence)
            return
        self._sharing.forget(sequence.seq_id)
        self._pool.free(sequence.block_table)
        num_ids = len(sequence.output_token_ids)
        out = outputs.token_out(sequence, sequence.choice, num_ids, [], None, finish)
        self._send(messages.Tokens(0, [out]))

    def _drop(self, rid: str, xfer: str) -> None:
        if xfer:
            self._reader.refuse(rid, xfer)
            return
        self._writer.drop(rid)
        self._reader.refuse_all(rid)
        for sequence in self._choices_of(rid):
            self._release(sequence)

    def _choices_of(self, rid: str) -> list[Sequence]:
        return [sequence for seq_id, sequence in self._live.items() if seq_id[0] == rid]

    def _stop_choice(self, rid: str, choice: int) -> None:
        sequence = self._live.get((rid, choice))
        if sequence is not None and not self._writer.knows(rid):
            self._sharing.ended(sequence)
            self._release(sequence)

    # ---------------------------------------------------------------- events of the KV node
    def handle_kv(self, event: kv.Event) -> None:
        if self._dry_runs.owns(event.xfer):
            self._dry_runs.on_event(event)
            self._meet(self._dry_runs.usable)
            return
        if self._sharing.takes(event):
            return
        match event:
            case kv.ReserveRequested():
                self._reader.on_reserve(event)
            case kv.Arrived():
                self._reader.on_arrived(event)
            case kv.BlocksFree():
                self._reader.on_blocks_free(event)
            case kv.GrantReceived():
                self._writer.on_grant(event)
            case kv.GrantRefused():
                self._writer.on_refusal(event)
            case kv.Handed():
                self._writer.on_handed(event.xfer)
            case kv.Refused():
                self._writer.on_refused(event)
            case kv.PushFailed():
                self._writer.on_failed(event)
            case kv.SourceFree():
                self._writer.on_source_free(event.xfer)

    def arrivals_told_by(self, post: Callable[[EngineMessage], bool]) -> Callable[[kv.Event], bool]:
        """For `KVNode.divert`: see `EarlyArrivals`."""
        return EarlyArrivals(self._reader, post, wake_fd=self._kv.wake_fd).takes

    def _may_admit(self, num_blocks: int, num_expected: int) -> bool:
        has_place = len(self._live) + num_expected < self._control.num_places
        # With nobody here there is no growth to keep blocks for, and a prompt of nearly the whole pool must get in.
        watermark = self._watermark_blocks if self._live or num_expected else 0
        owed = self._relief.ladder.swapped.num_blocks  # whoever was swapped comes back before a newcomer gets in
        return has_place and self._pool.num_free - num_blocks >= watermark + owed

    # ---------------------------------------------------------------- steps
    def step(self) -> bool:
        """One decision and one forward pass. False if there was nothing to do.

        An error of the forward pass fails the sequences of this step by name and leaves the others alone.
        """
        now = self._clock()
        self._dry_runs.turn()
        self._writer.seek()
        self._settle_parked()
        self._report_stats(now)
        if self._is_suspended(now):
            return False
        self._relief.ladder.moving = {rid for rid in self._relief.ladder.moving if self._writer.knows(rid)}
        plan = self._scheduler.schedule(now)
        if plan is None:
            return False
        self._stale_steps += plan.max_outputs if now - self._lease_s > STALE_LEASE_S else 0
        plan = self._make_room(plan)
        if not plan.scheduled:
            return bool(plan.preempted or plan.swapped_out or plan.swapped_in)
        try:
            sampled = self._forward(plan)
        except EngineError as error:
            self._fail(plan, error)
            return True
        self._scheduler.complete(plan, {item.sequence.seq_id: item.token_ids for item in sampled})
        self._figures.sampled(plan, sampled)
        self._after_step(plan, sampled)
        self._reader.stepped(plan, began_s=now)
        self._measure(plan, now)
        return True

    def _forward(self, plan: StepPlan) -> list[SampledTokens]:
        if not self._writer.num_outgoing:
            return self._runner.run(plan).sampled
        batches = self._writer.blocks_of_step(plan)
        for item in plan.scheduled:
            offset = (item.start + item.num_new_tokens) % self._block_size
            if offset and item.samples and self._writer.knows(item.sequence.rid):
                # The tail of the last block goes over the wire, too: zeros, never another sequence's KV.
                self._runner.zero_tail(item.sequence.block_table[item.sequence.num_tokens // self._block_size], offset)
        if not batches:
            return self._runner.run(plan).sampled
        num_blocks = sum(len(pairs) for _, pairs in batches)
        result = self._runner.run(
            plan,
            on_layers=lambda lo, hi: self._writer.push_layers(batches, lo, hi),
            layer_group=max(1, self._layer_group_bytes // (num_blocks * self._layer_bytes)),
        )
        self._writer.step_pushed(batches)
        return result.sampled

    def _after_step(self, plan: StepPlan, sampled: list[SampledTokens]) -> None:
        outs: list[TokenOut] = []
        computed: list[tuple[Sequence, list[list[int]], bool]] = []
        for item in sampled:
            sequence = item.sequence
            if sequence.seq_id not in self._live:
                continue
            if sequence.grammar is not None and sequence.grammar.failure:
                self._fail_request(sequence.rid, "constraint_failed", sequence.grammar.failure)
                continue
            if self._writer.knows(sequence.rid):
                computed.append((sequence, *outputs.first_tokens(item, self._finish, outs)))
            elif sequence.num_samples > 1:
                self._fork_local(item, outs)
            else:
                self._emit(sequence, item.token_ids, item.logprobs, outs)
        if outs:
            self._figures.tokens_out(sum(len(out.token_ids) for out in outs))
            self._send(messages.Tokens(plan.step_id, outs))
        for sequence, choices, is_finished in computed:  # after its tokens: they are on their way before COMMIT is
            self._prompt_done(sequence, choices, is_finished=is_finished)

    def _emit(
        self, sequence: Sequence, ids: list[int], logprobs: list[TokenLogprobs] | None, outs: list[TokenOut]
    ) -> None:
        finish = self._finish.of(sequence)
        index = len(sequence.output_token_ids) - len(ids)
        outs.append(outputs.token_out(sequence, sequence.choice, index, ids, logprobs, finish))
        if finish is not None:
            self._sharing.ended(sequence)
            self._release(sequence)
        else:
            self._sharing.advanced(sequence)

    def _prompt_done(self, sequence: Sequence, choices: list[list[int]], *, is_finished: bool) -> None:
        """A prompt to hand over is computed: commit its transfer."""
        self._sharing.computed(sequence)
        self._live.pop(sequence.seq_id, None)
        self._scheduler.remove(sequence.seq_id)
        if is_finished:
            self._writer.finished_early(sequence)
        else:
            self._writer.computed(sequence, choices)

    def _fork_local(self, item: SampledTokens, outs: list[TokenOut]) -> None:
        """Role `both`, n > 1: the prompt is computed once; each choice goes on by itself."""
        sequence = item.sequence
        choices, _ = outputs.first_tokens(item, self._finish, outs)
        blocks, sequence.block_table = sequence.block_table, []
        self._live.pop(sequence.seq_id, None)
        self._scheduler.remove(sequence.seq_id)
        arrival = outputs.arrival_here(sequence, blocks, choices)
        for fork in self._reader.fork(arrival, sequence.epoch):
            if self._finish.of(fork) is None:
                self._start(fork)
            else:
                self._pool.free(fork.block_table)

    # ---------------------------------------------------------------- sequences come and go
    def _start(self, sequence: Sequence) -> None:
        self._live[sequence.seq_id] = sequence
        if self._grammars.is_ready(sequence):
            self._schedule(sequence)
        else:
            self._grammars.park(sequence)

    def _schedule(self, sequence: Sequence) -> None:
        if not self._sharing.parks(sequence) and not self._prefetch.parks(sequence):
            self._scheduler.add(sequence)

    def _settle_parked(self) -> None:
        for sequence in self._sharing.due() + self._prefetch.due():
            self._scheduler.add(sequence)
        for due in self._grammars.due():
            if due.failure:
                self._fail_request(due.sequence.rid, due.code, due.failure)
            elif due.sequence.seq_id in self._live:
                self._schedule(due.sequence)

    def _release(self, sequence: Sequence) -> None:
        """The sequence ended here: out of the scheduler, blocks back."""
        self._stop_sequence(sequence)
        blocks, sequence.block_table = sequence.block_table, []
        self._pool.free(blocks)

    def _stop_sequence(self, sequence: Sequence) -> None:
        self._live.pop(sequence.seq_id, None)
        self._grammars.forget(sequence.seq_id)
        self._prefetch.forget(sequence.seq_id)
        self._sharing.forget(sequence.seq_id)
        self._scheduler.remove(sequence.seq_id)

    # ---------------------------------------------------------------- preemption
    def _make_room(self, plan: StepPlan) -> StepPlan:
        """Let go of whom the plan takes blocks from, and what then is left to compute."""
        damaged = self._relief.copy(plan)
        for rid in {sequence.rid: None for sequence in plan.preempted} | dict.fromkeys(damaged):
            self._preempt(rid)
        for sequence in plan.moved:
            self._move(sequence)
        if not damaged:
            return plan
        return replace(plan, scheduled=tuple(i for i in plan.scheduled if i.sequence.rid not in damaged))

    def _preempt(self, rid: str) -> None:
        """The scheduler took its blocks. The whole request goes back to the queue: its choices stay together."""
        self._relief.counted("released")
        self._drop(rid, "")
        self._send(messages.Preempted(rid))

    def _move(self, sequence: Sequence) -> None:
        """It leaves for another decode worker; its blocks come back when that one has it, or nobody takes it."""
        self._stop_sequence(sequence)
        self._reader.left(sequence.rid)
        offset = sequence.num_computed_tokens % self._block_size
        if offset:  # as in `_forward`: no other sequence's KV leaves with it
            self._runner.zero_tail(sequence.block_table[sequence.num_computed_tokens // self._block_size], offset)
        self._relief.counted("moved")
        add = self._intake.add_of(sequence, now_s=self._clock())
        self._writer.move(add, sequence, num_blocks=self._intake.blocks_for(add, sequence.num_tokens))

    def _fail(self, plan: StepPlan, error: EngineError) -> None:
        for rid in {item.sequence.rid for item in plan.scheduled}:
            self._fail_request(rid, "internal_error", str(error), is_retryable=error.retryable)

    def _fail_request(self, rid: str, code: str, message: str, *, is_retryable: bool = False) -> None:
        self._drop(rid, "")
        self._send(messages.Failed(rid, code, message, is_retryable))

    # ---------------------------------------------------------------- time and figures
    def _is_suspended(self, now: float) -> bool:
        return now - self._lease_s > SUSPEND_AFTER_S or self._stale_steps >= MAX_STALE_STEPS

    def next_wakeup_s(self) -> float:
        """Clock time at which `step` may have something to do without any message."""
        now = self._clock()
        if self._is_suspended(now):
            return self._stats_at_s  # the lease that ends it comes as a message
        parts = (self._writer, self._dry_runs, self._grammars, self._prefetch, self._sharing)
        times = [self._stats_at_s, self._scheduler.next_wakeup_s(now), *(part.next_wakeup_s() for part in parts)]
        return min(time for time in times if time is not None)

    def _measure(self, plan: StepPlan, started_s: float) -> None:
        elapsed_s = self._clock() - started_s
        self._figures.step_done(plan, elapsed_s)
        self._control.observe(plan, elapsed_s)
        self._relief.ladder.costs.stepped(plan.num_tokens, elapsed_s)
        if self._on_step is not None:
            self._on_step(plan, elapsed_s)

    def _report_stats(self, now: float) -> None:
        if now < self._stats_at_s:
            return
        self._stats_at_s = now + STATS_S
        self._send(self.stats())

    def stats(self) -> messages.Stats:
        waiting = self._scheduler.num_waiting + self._writer.num_outgoing
        more = (
            self._relief.counters()
            | self._sharing.counters()
            | {"preempt_move_refused": float(self._writer.num_moves_refused)}
        )
        num_swapped = self._relief.ladder.swapped.num_used_pages
        return self._figures.stats(live=len(self._live), waiting=waiting, num_swapped_pages=num_swapped, more=more)
