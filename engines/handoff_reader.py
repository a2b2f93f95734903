"""The receiver's side of a hand-off: promise blocks, take verified KV, wait for the front's `handoff`, start sequences.

    ReserveRequested --blocks promised--> Incoming to the front          (grant: LEASED)
    Arrived (checksum held)           --> Arrived to the front           (COMMITTED)
    Promote: HANDED to the writer, sequences join the next step          (blocks belong to the sequences)
    Drop:    REFUSED to the writer, BlocksFree gives the blocks back

n choices of one prompt share its full blocks; each gets a copy of the last one, which its own tokens go into.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines import messages
from engines.dry_runs import DRY_RUN_RID
from engines.messages import EngineMessage
from engines.sequence import Sequence
from engines.transfer_state import TransferState, decode_state
from kvstore import transport as kv
from kvstore.blocks import OutOfBlocks
from kvstore.transport.settings import host_id

if TYPE_CHECKING:
    from engines.scheduler.plan import StepPlan
    from kvstore.blocks import BlockPool
    from kvstore.clock import Clock

TOO_LARGE = "too_large"  # the whole pool here has fewer blocks: waiting cannot help


@dataclass(frozen=True, slots=True)
class Arrival:
    """Verified KV that waits for the front's word. `verified_s` and, from this host, `computed_s`: see `Stepped`."""

    rid: str
    blocks: list[int]
    num_tokens: int
    state: TransferState
    deadline_s: float
    verified_s: float = 0.0
    computed_s: float | None = None


class HandoffReader:
    """Owned by the engine thread; `expects` and `keep` also serve the kv thread.

    `may_admit(num_blocks)` is the scheduler's word on one more sequence; `copy_blocks` duplicates KV of blocks.
    """

    def __init__(
        self,
        *,
        node: kv.KVPort,
        pool: BlockPool,
        block_size: int,
        send: Callable[[EngineMessage], None],
        may_admit: Callable[[int, int], bool],
        copy_blocks: Callable[[list[tuple[int, int]]], None],
        clock: Clock,
    ) -> None:
        self._kv = node
        self._pool = pool
        self._block_size = block_size
        self._send = send
        self._may_admit = may_admit
        self._copy_blocks = copy_blocks
        self._clock = clock
        self._host_id = host_id()
        self._joining: dict[str, tuple[int, Arrival]] = {}  # promoted, and in no step yet
        self._promised: dict[str, str] = {}  # xfer -> rid, until it arrives or is lost
        self._arrivals: dict[str, Arrival] = {}

    @property
    def num_expected(self) -> int:
        """Sequences that may join soon."""
        return len(self._promised) + len(self._arrivals)

    def on_reserve(self, event: kv.ReserveRequested) -> None:
        """All the blocks asked for, or none: a sequence that holds a part of what it needs can only block others."""
        if event.num_blocks > self._pool.num_blocks:
            self._kv.grant(event, None, reason=TOO_LARGE)
            return
        if not self._may_admit(event.num_blocks, self.num_expected):
            self._kv.grant(event, None, reason="no_space")
            return
        try:
            blocks = self._pool.allocate(event.num_blocks)
        except OutOfBlocks:
            self._kv.grant(event, None, reason="no_space")
            return
        if event.rid != DRY_RUN_RID:  # with that the front has no business
            self._send(messages.Incoming(event.rid, event.xfer))
            self._promised[event.xfer] = event.rid  # after `Incoming`, before the grant: see `EarlyArrivals`
        self._kv.grant(event, blocks)

    def on_arrived(self, event: kv.Arrived) -> None:
        if event.rid == DRY_RUN_RID:
            self._kv.settle(event.xfer, False)
            return
        self._send(self.keep(event))

    def expects(self, xfer: str) -> bool:
        """Any thread: blocks were promised for a request, and nothing has come of it yet."""
        return xfer in self._promised

    def keep(self, event: kv.Arrived) -> messages.Arrived:
        """Any thread. It waits for the front's word from here on; returns what the front is to be told.

        Raises:
            msgspec.DecodeError: its state is not ours. Nothing was kept.
        """
        state = decode_state(event.state)
        self._arrivals[event.xfer] = Arrival(
            event.rid,
            list(event.blocks),
            event.num_tokens,
            state,
            self._clock() + state.deadline_s,
            event.verified_s,
            state.computed_s if state.host_id == self._host_id else None,
        )
        self._promised.pop(event.xfer, None)  # last, so that `num_expected` never misses it
        return messages.Arrived(
            rid=event.rid,
            xfer=event.xfer,
            epoch=event.epoch,
            from_token=event.token,
            prompt_ids=state.prompt_ids,
            choices=state.choices,
            params=state.params,
            seed=state.seed,
            deadline_s=state.deadline_s,
            num_bytes=event.num_bytes,
            transfer_s=event.transfer_s,
            cached_tokens=state.cached_tokens,
        )

    def on_blocks_free(self, event: kv.BlocksFree) -> None:
        self._pool.free(list(event.blocks))
        self._arrivals.pop(event.xfer, None)
        rid = self._promised.pop(event.xfer, None)
        if rid is not None:
            self._send(messages.ArrivalLost(rid, event.xfer))

    def promote(self, rid: str, xfer: str, epoch: int) -> list[Sequence]:
        """Sequences of an arrival, ready to step; [] if it is gone. They own its blocks from here on."""
        arrival = self._arrivals.pop(xfer, None)
        if arrival is None or arrival.rid != rid:
            return []
        self._kv.settle(xfer, True)
        self._joining[rid] = (epoch, arrival)
        return self.fork(arrival, epoch)

    def stepped(self, plan: StepPlan, *, began_s: float) -> None:
        """A step is over: tell the front of sequences whose first one it was."""
        if not self._joining:
            return
        for item in plan.scheduled:
            epoch, arrival = self._joining.pop(item.sequence.rid, (0, None))
            if arrival is not None:
                self._send(
                    messages.Stepped(arrival.rid, epoch, arrival.verified_s, began_s, self._clock(), arrival.computed_s)
                )

    def left(self, rid: str) -> None:
        """It will make no first step here."""
        self._joining.pop(rid, None)

    def refuse(self, rid: str, xfer: str) -> None:
        """The front's `handoff` was not OK."""
        arrival = self._arrivals.get(xfer)
        if arrival is not None and arrival.rid == rid:
            del self._arrivals[xfer]
            self._kv.settle(xfer, False)

    def refuse_all(self, rid: str) -> None:
        self.left(rid)
        # `list`: the kv thread may keep another one meanwhile.
        for xfer in [xfer for xfer, arrival in list(self._arrivals.items()) if arrival.rid == rid]:
            self.refuse(rid, xfer)

    def fork(self, arrival: Arrival, epoch: int) -> list[Sequence]:
        """One sequence per choice. A choice that finds no block for its copy starts from nothing and recomputes."""
        state = arrival.state
        sequences = []
        for choice, output_ids in enumerate(state.choices):
            sequence = Sequence(
                rid=arrival.rid,
                choice=choice,
                prompt_token_ids=state.prompt_ids,
                params=state.params,
                seed=state.seed,
                output_token_ids=list(output_ids),
                arrival_s=self._clock(),
                deadline_s=arrival.deadline_s,
                priority=state.priority,
                tenant=state.tenant,
                num_cached_tokens=state.cached_tokens,
                num_preemptions=state.num_preemptions,
                epoch=epoch,
            )
            if choice == 0:
                sequence.block_table = arrival.blocks
                sequence.num_computed_tokens = arrival.num_tokens
            else:
                self._share(sequence, arrival)
            # A sequence whose every token has KV has no logits to sample from: compute its last token again.
            sequence.num_computed_tokens = min(sequence.num_computed_tokens, sequence.num_tokens - 1)
            sequences.append(sequence)
        return sequences

    def _share(self, sequence: Sequence, arrival: Arrival) -> None:
        num_kv_blocks = -(-arrival.num_tokens // self._block_size)
        shared, last = arrival.blocks[: num_kv_blocks - 1], arrival.blocks[num_kv_blocks - 1]
        try:
            own = self._pool.allocate(1)
        except OutOfBlocks:
            return
        self._copy_blocks([(last, own[0])])
        self._pool.share(shared)
        sequence.block_table = shared + own
        sequence.num_computed_tokens = arrival.num_tokens
