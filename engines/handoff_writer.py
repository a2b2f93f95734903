"""The writer's side of a hand-off: find a decode worker, push KV while it is computed, commit, let go.

Add(push) --> SEEKING --reserve--> RESERVING --GrantReceived--> GRANTED --computed, commit--> COMMITTED --> gone
                 ^                     | refused                   | link failed               | Handed, Refused
                 '---------------------+---------------------------+---------------------------'  (failed)
A sequence without a grant holds no blocks and is not computed. One whose push failed keeps its KV and looks
for another receiver, so nothing is computed twice. A decode worker that runs out of blocks moves a sequence the same
way, from where it stands: all its KV is there. It asks each peer once, because the blocks are wanted here meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from engines.handoff_reader import TOO_LARGE
from engines.messages import Add, EngineMessage, Failed, Granted, NoGrant, Pushed, Target
from engines.scheduler.plan import StepPlan
from engines.scheduler.pressure import DecodePressure
from engines.sequence import Sequence
from engines.transfer_state import TransferState, encode_state
from kvstore import transport as kv
from kvstore.transport.settings import host_id

if TYPE_CHECKING:
    from kvstore.blocks import BlockPool
    from kvstore.clock import Clock

MAX_RESERVES_IN_FLIGHT = 8  # keeps the order of arrival meaningful while pools are full
RETRY_S = 0.03  # without anybody to ask
PATIENCE_S = 15.0  # without any grant; the front then looks at the registry again
MOVE_PATIENCE_S = 1.0  # the same for a sequence that moves
MAX_PUSH_FAILURES = 3


class PushPhase(StrEnum):
    SEEKING = "seeking"
    RESERVING = "reserving"
    GRANTED = "granted"
    COMMITTED = "committed"


PHASES: dict[PushPhase, frozenset[PushPhase]] = {
    PushPhase.SEEKING: frozenset({PushPhase.RESERVING}),
    PushPhase.RESERVING: frozenset({PushPhase.SEEKING, PushPhase.GRANTED}),
    PushPhase.GRANTED: frozenset({PushPhase.COMMITTED, PushPhase.SEEKING}),
    PushPhase.COMMITTED: frozenset({PushPhase.SEEKING}),
}


@dataclass(slots=True, eq=False)
class Outgoing:
    """One request on its way out. `xfer` changes with each reservation; a closed one is never used again."""

    add: Add
    sequence: Sequence
    num_blocks: int  # of our size
    since_s: float
    num_tokens: int = 0  # that the grant must hold, whatever the size of the receiver's blocks; 0: what ours hold
    phase: PushPhase = PushPhase.SEEKING
    xfer: str = ""
    node: str = ""
    attempt: int = 0  # grants so far
    num_failures: int = 0
    next_target: int = 0
    num_too_large: int = 0  # refusals in a row because a whole pool is too small
    is_scheduled: bool = False  # the scheduler has it, or had it until it was computed
    is_computed: bool = False
    is_move: bool = False
    choices: list[list[int]] = field(default_factory=list)
    num_pushed_blocks: int = 0
    num_bytes: int = 0
    granted_s: float = 0.0  # first grant
    computed_s: float = 0.0

    @property
    def patience_s(self) -> float:
        return MOVE_PATIENCE_S if self.is_move else PATIENCE_S

    def advance(self, phase: PushPhase) -> None:
        assert phase in PHASES[self.phase], f"{self.phase} -> {phase}"
        self.phase = phase


class HandoffWriter:
    """Owned by the engine thread. `schedule` puts a sequence into the scheduler, once it has its grant.

    `pressure` is told of grants and refusals, and says when to ask again.
    """

    def __init__(
        self,
        *,
        node: kv.KVPort,
        pool: BlockPool,
        block_size: int,
        block_bytes: int,
        incarnation: str,
        send: Callable[[EngineMessage], None],
        schedule: Callable[[Sequence], None],
        unschedule: Callable[[Sequence], None],
        clock: Clock,
        pressure: DecodePressure | None = None,
    ) -> None:
        self._kv = node
        self._pool = pool
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._incarnation = incarnation
        self._send = send
        self._schedule = schedule
        self._unschedule = unschedule
        self._clock = clock
        self._host_id = host_id()
        self._pressure = pressure or DecodePressure()
        self._by_rid: dict[str, Outgoing] = {}
        self._by_xfer: dict[str, Outgoing] = {}
        self._lingering: dict[str, list[int]] = {}  # xfer -> source blocks that may still be read by the kv thread
        self._peers: list[Target] = []
        self._counter = 0
        self.num_moves_refused = 0
        self._retry_at_s = 0.0

    @property
    def num_outgoing(self) -> int:
        return len(self._by_rid)

    def knows(self, rid: str) -> bool:
        return rid in self._by_rid

    # ---------------------------------------------------------------- from the front
    def add(self, add: Add, sequence: Sequence, *, num_blocks: int, num_tokens: int = 0) -> None:
        """Take a request; it is scheduled when a decode worker has promised `num_tokens`, or `num_blocks` of ours."""
        if add.rid in self._by_rid:
            return
        now = self._clock()
        self._by_rid[add.rid] = Outgoing(add, sequence, num_blocks, now, num_tokens)
        self.seek()

    def move(self, add: Add, sequence: Sequence, *, num_blocks: int) -> None:
        """Take a sequence that decodes here, its blocks with it, to another decode worker. It is in no scheduler."""
        now = self._clock()
        self._by_rid[add.rid] = Outgoing(
            add,
            sequence,
            num_blocks,
            now,
            is_scheduled=True,
            is_computed=True,
            is_move=True,
            choices=add.choices,
            computed_s=now,
        )
        self.seek()

    def set_peers(self, targets: list[Target]) -> None:
        self._peers = targets

    def drop(self, rid: str) -> None:
        """Forget a request: close its transfer, free its blocks as soon as nothing reads them."""
        out = self._by_rid.pop(rid, None)
        if out is None:
            return
        if out.is_scheduled and not out.is_computed:
            self._unschedule(out.sequence)
        self._let_go(out)

    # ---------------------------------------------------------------- grants
    def seek(self) -> None:
        """Send reservations for the oldest requests without a grant."""
        now = self._clock()
        in_flight = self._num_reserving()
        for out in list(self._by_rid.values()):
            if out.phase is not PushPhase.SEEKING:
                continue
            targets = self._peers or out.add.targets
            if now - out.since_s > out.patience_s or (out.is_move and out.next_target >= len(targets)):
                self._give_up_seeking(out)
                continue
            if in_flight >= MAX_RESERVES_IN_FLIGHT or (now < self._retry_at_s and not out.is_move):
                continue
            if not targets:
                self._retry_at_s = now + RETRY_S
                continue
            in_flight += 1
            self._reserve(out, targets[out.next_target % len(targets)])

    def next_wakeup_s(self) -> float | None:
        """When `seek` has something to do that no event brings, or None."""
        seeking = [out for out in self._by_rid.values() if out.phase is PushPhase.SEEKING]
        if not seeking:
            return None
        patience_s = min(out.since_s + out.patience_s for out in seeking)
        if self._num_reserving() >= MAX_RESERVES_IN_FLIGHT:
            return patience_s  # the answers to those are events
        return min(max(self._retry_at_s, self._clock()), patience_s)

    def _num_reserving(self) -> int:
        return sum(out.phase is PushPhase.RESERVING for out in self._by_rid.values())

    def _reserve(self, out: Outgoing, target: Target) -> None:
        self._counter += 1
        out.xfer = f"{self._incarnation}:{self._counter}"
        out.node = target.node
        out.num_pushed_blocks = 0
        out.advance(PushPhase.RESERVING)
        self._by_xfer[out.xfer] = out
        self._kv.reserve(
            target.address,
            out.xfer,
            rid=out.add.rid,
            epoch=out.add.epoch,
            token=out.add.token,
            num_blocks=out.num_blocks,
            num_tokens=out.num_tokens,
            deadline_s=out.add.deadline_s,
        )

    def on_grant(self, event: kv.GrantReceived) -> None:
        out = self._by_xfer.get(event.xfer)
        if out is None or out.xfer != event.xfer:
            return
        out.advance(PushPhase.GRANTED)
        self._pressure.granted()
        out.attempt += 1
        out.granted_s = out.granted_s or self._clock()  # what a failed push costs counts as transfer
        self._send(Granted(out.add.rid, out.xfer, out.node, out.attempt))
        if out.is_computed:
            self._push_rest(out)
            self._commit(out)
        elif not out.is_scheduled:
            out.is_scheduled = True
            self._schedule(out.sequence)

    def on_refusal(self, event: kv.GrantRefused) -> None:
        """No blocks there now: try the next target; once all refused, wait a moment."""
        out = self._by_xfer.pop(event.xfer, None)
        if out is None or out.xfer != event.xfer:
            return
        out.advance(PushPhase.SEEKING)
        out.next_target += 1
        targets = self._peers or out.add.targets
        if out.is_move:
            self.seek()
            return
        out.num_too_large = out.num_too_large + 1 if event.reason == TOO_LARGE else 0
        if out.num_too_large >= len(targets):
            self._refuse(out)
            return
        if out.next_target % max(len(targets), 1) == 0:
            self._pressure.refused(self._clock())
            self._retry_at_s = self._pressure.retry_at_s

    def _refuse(self, out: Outgoing) -> None:
        """No decode worker could ever hold it."""
        del self._by_rid[out.add.rid]
        self._let_go(out)
        text = f"{out.num_blocks} KV blocks are needed, every decode worker has fewer (`kv.memory_bytes`)"
        self._send(Failed(out.add.rid, "context_length_exceeded", text))

    def _give_up_seeking(self, out: Outgoing) -> None:
        del self._by_rid[out.add.rid]
        self._let_go(out)
        self.num_moves_refused += out.is_move
        self._send(NoGrant(out.add.rid, f"no decode worker promised {out.num_blocks} blocks"))

    # ---------------------------------------------------------------- pushing
    def blocks_of_step(self, plan: StepPlan) -> list[tuple[Outgoing, list[tuple[int, int]]]]:
        """For each granted sequence of the step: (source block, place in the grant) of the blocks it completes.

        A block that the step leaves partly filled waits for the step that fills it, unless the prompt ends in it.
        """
        batches = []
        for item in plan.scheduled:
            out = self._by_rid.get(item.sequence.rid)
            if out is None or out.phase is not PushPhase.GRANTED:
                continue
            end = item.start + item.num_new_tokens
            is_last = end == item.sequence.num_tokens
            hi = -(-end // self._block_size) if is_last else end // self._block_size
            table = item.sequence.block_table
            pairs = [(table[i], i) for i in range(out.num_pushed_blocks, hi)]
            if pairs:
                batches.append((out, pairs))
        return batches

    def push_layers(self, batches: list[tuple[Outgoing, list[tuple[int, int]]]], lo: int, hi: int) -> None:
        """Layers [lo, hi) of these blocks are computed: send them while later layers compute."""
        for out, pairs in batches:
            if out.phase is PushPhase.GRANTED:
                self._kv.push(out.xfer, pairs, lo, hi)

    def step_pushed(self, batches: list[tuple[Outgoing, list[tuple[int, int]]]]) -> None:
        for out, pairs in batches:
            if out.phase is PushPhase.GRANTED:
                out.num_pushed_blocks = pairs[-1][1] + 1
                out.num_bytes += len(pairs) * self._block_bytes

    def computed(self, sequence: Sequence, choices: list[list[int]]) -> None:
        """All of `sequence` has KV; `choices` are the ids so far, first tokens included."""
        out = self._by_rid.get(sequence.rid)
        if out is None:
            return
        out.is_computed, out.choices = True, choices or out.add.choices
        out.computed_s = self._clock()
        if out.phase is PushPhase.GRANTED:
            self._push_rest(out)
            self._commit(out)

    def finished_early(self, sequence: Sequence) -> None:
        """Every choice ended with its first token: the front publishes the end, nothing is handed over."""
        out = self._by_rid.pop(sequence.rid, None)
        if out is not None:
            out.is_computed = True
            self._let_go(out)

    def _push_rest(self, out: Outgoing) -> None:
        """Blocks that no step pushed: all of them after a failed push."""
        num_kv_blocks = -(-out.sequence.num_computed_tokens // self._block_size)
        pairs = [(out.sequence.block_table[i], i) for i in range(out.num_pushed_blocks, num_kv_blocks)]
        if pairs:
            self._kv.push(out.xfer, pairs, 0, self._kv.num_layers)
            self.step_pushed([(out, pairs)])

    def _commit(self, out: Outgoing) -> None:
        sequence, add = out.sequence, out.add
        state = TransferState(
            add.prompt_ids,
            out.choices,
            add.params,
            add.seed,
            max(sequence.deadline_s - self._clock(), 0.0),
            sequence.num_cached_tokens,
            add.tenant,
            add.priority,
            sequence.num_preemptions,
            self._host_id,
            out.computed_s,
        )
        num_kv_blocks = -(-sequence.num_computed_tokens // self._block_size)
        out.advance(PushPhase.COMMITTED)
        self._kv.commit(
            out.xfer,
            src_blocks=sequence.block_table[:num_kv_blocks],
            num_tokens=sequence.num_computed_tokens,
            state=encode_state(state),
        )

    # ---------------------------------------------------------------- ends
    def on_handed(self, xfer: str) -> None:
        self._end(xfer, "handed", "")

    def on_refused(self, event: kv.Refused) -> None:
        self._end(event.xfer, "refused", event.reason)

    def on_failed(self, event: kv.PushFailed) -> None:
        """The transfer is closed. The KV is still here: look for another receiver, a few times."""
        out = self._by_xfer.pop(event.xfer, None)
        if out is None or out.xfer != event.xfer:
            return
        out.num_failures += 1
        if out.num_failures >= MAX_PUSH_FAILURES:
            del self._by_rid[out.add.rid]
            if out.is_scheduled and not out.is_computed:
                self._unschedule(out.sequence)
            self._let_go(out)
            self._report(out, "failed", event.reason)
            return
        if out.phase is not PushPhase.SEEKING:
            out.advance(PushPhase.SEEKING)
        out.since_s, out.num_pushed_blocks = self._clock(), 0
        out.next_target += 1

    def on_source_free(self, xfer: str) -> None:
        blocks = self._lingering.pop(xfer, None)
        if blocks:
            self._pool.free(blocks)

    def _end(self, xfer: str, outcome: str, reason: str) -> None:
        out = self._by_xfer.pop(xfer, None)
        if out is None or out.xfer != xfer:
            return
        self._by_rid.pop(out.add.rid, None)
        blocks, out.sequence.block_table = out.sequence.block_table, []
        self._pool.free(blocks)  # COMMIT was answered: the kv thread reads them no more
        self._report(out, outcome, reason)

    def _let_go(self, out: Outgoing) -> None:
        """Close the transfer; the blocks are freed when the kv thread has stopped reading them."""
        blocks, out.sequence.block_table = out.sequence.block_table, []
        if out.xfer and self._by_xfer.pop(out.xfer, None) is not None:
            self._lingering[out.xfer] = blocks
            self._kv.abandon(out.xfer)
        elif blocks:
            self._pool.free(blocks)

    def _report(self, out: Outgoing, outcome: str, reason: str) -> None:
        self._send(
            Pushed(
                rid=out.add.rid,
                xfer=out.xfer,
                outcome=outcome,  # type: ignore[arg-type]
                reason=reason,
                num_bytes=out.num_bytes,
                granted_s=out.granted_s,
                computed_s=out.computed_s,
            )
        )
