"""A KV node for engines whose KV peers cannot map: it moves through the slots of a bounce region, which a node serves.

    push      device blocks --copy--> slots of this transfer --node.push--> peer       Handed, ...: slots free
    grant     slots beside the engine's blocks, or a refusal; peers are told of slots only
    Arrived   slots --copy--> device blocks, then the engine hears of it               settle, BlocksFree: slots free

    engine thread ── jobs ──▶ copy threads, one for each direction ── node.push, node.commit ──▶ kv thread
                  ◀── events, when what they speak of is copied ──

Slots come free by the very events that free source blocks and granted blocks, so fences, quarantine and proofs of death
hold for them as for any block. A push that finds no slots waits, first come, first served; a grant that finds none is
refused, and the writer asks again. See `SlotPool` for why that locks nobody up.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, Protocol

from engines.device_kv.copies import Copies, Gate
from engines.device_kv.lane import Lane
from engines.device_kv.slot_pool import Direction, SlotPool
from kvstore.address import KVAddress
from kvstore.blocks import OutOfBlocks
from kvstore.link_report import LinkReport
from kvstore.overdue import OverdueWriter
from kvstore.transport import (
    Arrived,
    BlocksFree,
    Event,
    FetchRequested,
    GrantRefused,
    Handed,
    KVPort,
    PushFailed,
    Refused,
    ReserveRequested,
    SourceFree,
    TransportError,
)

NO_SLOTS: Final = "no_slots"  # every slot is taken just now
TOO_LARGE: Final = "too_large"  # no transfer of so many blocks ever gets its slots

Pairs = list[tuple[int, int]]


class DivertingPort(KVPort, Protocol):
    """The node beneath: it lets us see an event before `poll_events` does."""

    def divert(self, takes: Callable[[Event], bool]) -> None: ...


@dataclass(slots=True, eq=False)
class _Outgoing:
    """A transfer of ours. `slots[i]` is for place i, once it has any.

    Attributes:
        waiting: what is to be done as soon as there are slots, in order.
        num_submitted, num_done: jobs of the lane; the first is written by the engine thread, the second by the lane.
        is_over: nothing of it need be copied any more.
        is_ending: an event that ends it waits for its copies, and so does any that follows.
    """

    num_slots: int
    slots: list[int] = field(default_factory=list)
    waiting: deque[Callable[[], None]] = field(default_factory=deque)
    num_submitted: int = 0
    num_done: int = 0
    is_over: bool = False
    is_ending: bool = False


@dataclass(slots=True, eq=False)
class _Incoming:
    """A grant of ours: `slots[i]` is where a peer writes what belongs into `blocks[i]`.

    Attributes:
        is_landing: written by whoever sees it arrive, before the copy begins.
        is_told: the engine has heard of the arrival.
    """

    slots: list[int]
    blocks: list[int] = field(default_factory=list)
    gate: Gate = None
    is_landing: bool = False
    is_told: bool = False


class BouncedNode:
    """A `KVPort`. All methods are for the engine thread.

    Args:
        node: serves the bounce region; not started yet. `push` and `commit` are called from the outgoing lane.
        slots: of that region.
        block_size: tokens per block.
        make_lane: from a name and what is to be told of a failure.
    """

    def __init__(
        self,
        node: DivertingPort,
        slots: SlotPool,
        copies: Copies,
        *,
        block_size: int,
        make_lane: Callable[[str, Callable[[Exception], None]], Lane],
    ) -> None:
        self._node = node
        self._slots = slots
        self._copies = copies
        self._block_size = block_size
        self._saving = make_lane("kv-copy-out", self._failed)
        self._loading = make_lane("kv-copy-in", self._failed)
        self._outgoing: dict[str, _Outgoing] = {}
        self._incoming: dict[str, _Incoming] = {}
        self._queue: deque[str] = deque()  # pushes that wait for slots, the oldest first
        self._ready: deque[Event] = deque()  # of the lanes, for the engine
        self._failure: Exception | None = None
        self._num_waited = self._num_refused = 0
        node.divert(self._diverts)

    # ---------------------------------------------------------------- life
    @property
    def num_layers(self) -> int:
        return self._node.num_layers

    @property
    def wake_fd(self) -> int:
        return self._node.wake_fd

    def start(self) -> KVAddress:
        self._saving.start()
        self._loading.start()
        return self._node.start()

    def stop(self) -> None:
        """The lanes first: they wake the engine over a descriptor that the node closes."""
        self._saving.stop()
        self._loading.stop()
        self._node.stop()

    # ---------------------------------------------------------------- writer
    def reserve(
        self,
        target: KVAddress,
        xfer: str,
        *,
        rid: str,
        epoch: int,
        token: str,
        num_blocks: int,
        deadline_s: float,
        num_tokens: int = 0,
        group: str = "",
    ) -> None:
        """As `KVNode.reserve`. More blocks than a transfer may have slots: `GrantRefused` at once."""
        if num_blocks > self._slots.max_per_transfer:
            text = f"{num_blocks} blocks, at most {self._slots.max_per_transfer} may move at once (`kv.bounce_bytes`)"
            self._tell(GrantRefused(xfer, TOO_LARGE, text))
            return
        self._outgoing[xfer] = _Outgoing(num_blocks)
        self._node.reserve(
            target,
            xfer,
            rid=rid,
            epoch=epoch,
            token=token,
            num_blocks=num_blocks,
            deadline_s=deadline_s,
            num_tokens=num_tokens,
            group=group,
        )

    def push(self, xfer: str, pairs: Pairs, layer_lo: int, layer_hi: int) -> None:
        """Copy layers of blocks into slots, behind the compute so far, and push them from there."""
        out = self._outgoing.get(xfer)
        if out is not None and not out.is_over:
            gate = self._copies.gate()
            self._when_slots(xfer, out, lambda: self._save(xfer, out, gate, list(pairs), layer_lo, layer_hi))

    def commit(self, xfer: str, *, src_blocks: list[int], num_tokens: int, state: bytes) -> None:
        out = self._outgoing.get(xfer)
        if out is not None and not out.is_over:
            num = len(src_blocks)
            self._when_slots(xfer, out, lambda: self._commit(xfer, out, num, num_tokens, state))

    def abandon(self, xfer: str) -> None:
        out = self._outgoing.get(xfer)
        if out is not None:
            self._end(xfer, out)
        self._node.abandon(xfer)

    def fetch(self, holder: KVAddress, name: str, keys: Sequence[bytes], *, first: int) -> None:
        self._node.fetch(holder, name, keys, first=first)

    def decline(self, request: FetchRequested) -> None:
        self._node.decline(request)

    # ---------------------------------------------------------------- receiver
    def grant(self, request: ReserveRequested, blocks: list[int] | None, reason: str = "") -> None:
        """As `KVNode.grant`: the slots were set aside when the engine was asked."""
        incoming = self._incoming[request.xfer]
        if blocks is None:
            del self._incoming[request.xfer]
            self._free(Direction.INCOMING, incoming.slots)
            self._node.grant(request, None, reason)
            return
        if len(blocks) != len(incoming.slots):
            raise ValueError(f"{len(blocks)} blocks for {request.xfer}, which asks for {len(incoming.slots)}")
        incoming.blocks, incoming.gate = blocks, self._copies.gate()
        self._node.grant(request, incoming.slots, reason)

    def settle(self, xfer: str, handed: bool) -> None:
        self._node.settle(xfer, handed)
        if handed and xfer in self._incoming:
            self._free(Direction.INCOMING, self._incoming.pop(xfer).slots)

    # ---------------------------------------------------------------- both
    def poll_events(self) -> list[Event]:
        """As `KVNode.poll_events`, with block ids of the engine.

        Raises:
            TransportError: the `kv` thread or a copy has failed; this engine must end.
        """
        events = self._node.poll_events()  # which also clears `wake_fd`: what is ready after this wakes again
        if self._failure is not None:
            raise TransportError("copying KV to or from the device failed; restart this engine") from self._failure
        told: list[Event] = []
        for event in events:
            told += self._on_event(event)
        while self._ready:
            told += self._on_ready(self._ready.popleft())
        return told

    def grants(self) -> dict[str, int]:
        return self._node.grants()

    def overdue_writers(self) -> tuple[OverdueWriter, ...]:
        return self._node.overdue_writers()

    def counters(self) -> dict[str, float]:
        """Those of the node, and: bounce_waits (pushes that waited for slots), bounce_refusals (grants without)."""
        mine = {"bounce_waits": float(self._num_waited), "bounce_refusals": float(self._num_refused)}
        return {**self._node.counters(), **mine}

    def links(self) -> tuple[LinkReport, ...]:
        return self._node.links()

    def rejects(self) -> dict[str, int]:
        return self._node.rejects()

    def check_invariants(self) -> None:
        """Of the node, and: each slot is free or of one transfer. Raises AssertionError."""
        self._node.check_invariants()
        self._slots.check_invariants()
        outgoing = [slot for out in self._outgoing.values() for slot in out.slots]
        incoming = [slot for one in self._incoming.values() for slot in one.slots]
        assert len(set(outgoing + incoming)) == len(outgoing + incoming), "a slot is of two transfers"
        held = (self._slots.held(Direction.OUTGOING), self._slots.held(Direction.INCOMING))
        assert held == (len(outgoing), len(incoming)), f"slots held {held}, used {len(outgoing)}, {len(incoming)}"

    # ---------------------------------------------------------------- outgoing
    def _when_slots(self, xfer: str, out: _Outgoing, action: Callable[[], None]) -> None:
        """Run `action` as soon as the transfer has its slots: all of them, in the order of the transfers."""
        if out.slots:
            action()
            return
        if not out.waiting:
            self._queue.append(xfer)
        out.waiting.append(action)
        self._serve()
        self._num_waited += len(out.waiting) == 1

    def _serve(self) -> None:
        """Give slots to those who wait. Strictly in turn: a large transfer is not overtaken for ever."""
        while self._queue:
            out = self._outgoing[self._queue[0]]
            try:
                out.slots = self._slots.allocate(Direction.OUTGOING, out.num_slots)
            except OutOfBlocks:
                return
            self._queue.popleft()
            while out.waiting:
                out.waiting.popleft()()

    def _save(self, xfer: str, out: _Outgoing, gate: Gate, pairs: Pairs, lo: int, hi: int) -> None:
        to_slots = [(block, out.slots[place]) for block, place in pairs]
        to_peer = [(out.slots[place], place) for _, place in pairs]

        def job() -> None:
            if not out.is_over:
                self._copies.save(gate, to_slots, lo, hi)
                self._node.push(xfer, to_peer, lo, hi)

        self._submit(out, job)

    def _commit(self, xfer: str, out: _Outgoing, num_blocks: int, num_tokens: int, state: bytes) -> None:
        slots = out.slots[:num_blocks]
        self._submit(out, lambda: self._node.commit(xfer, src_blocks=slots, num_tokens=num_tokens, state=state))

    def _submit(self, out: _Outgoing, job: Callable[[], None]) -> None:
        def counted() -> None:
            job()
            out.num_done += 1

        out.num_submitted += 1
        self._saving.submit(counted)

    def _end(self, xfer: str, out: _Outgoing) -> None:
        """Copy no more of it. Its slots stay its own until the node says that it reads them no more."""
        out.is_over = True
        if out.waiting:
            out.waiting.clear()
            self._queue.remove(xfer)

    # ---------------------------------------------------------------- events
    def _on_event(self, event: Event) -> list[Event]:
        """An event of the node: what the engine is told of it now."""
        match event:
            case ReserveRequested():
                return self._on_reserve(event)
            case BlocksFree():
                incoming = self._incoming[event.xfer]
                if incoming.is_landing and not incoming.is_told:
                    self._loading.submit(partial(self._tell, event))
                    return []
                return self._on_ready(event)
            case Handed() | Refused() | PushFailed() | SourceFree() | GrantRefused():
                out = self._outgoing.get(event.xfer)
                if out is None:
                    return [event]
                self._end(event.xfer, out)
                if out.is_ending or out.num_done < out.num_submitted:
                    out.is_ending = True  # a copy may be under way: it reads the engine's blocks
                    self._submit(out, partial(self._tell, event))
                    return []
                return self._on_ready(event)
        return [event]

    def _on_ready(self, event: Event) -> list[Event]:
        """An event behind which no copy is under way."""
        if isinstance(event, Arrived):
            self._incoming[event.xfer].is_told = True
        elif isinstance(event, BlocksFree):
            incoming = self._incoming.pop(event.xfer)
            self._free(Direction.INCOMING, incoming.slots)
            return [BlocksFree(tuple(incoming.blocks), event.xfer)]
        elif event.xfer in self._outgoing:
            out = self._outgoing.pop(event.xfer)
            if out.slots:
                self._free(Direction.OUTGOING, out.slots)
        return [event]

    def _on_reserve(self, request: ReserveRequested) -> list[Event]:
        """Slots before the engine is asked: with none it need not take blocks."""
        if request.num_blocks > self._slots.max_per_transfer:
            self._node.grant(request, None, TOO_LARGE)
            return []
        try:
            slots = self._slots.allocate(Direction.INCOMING, request.num_blocks)
        except OutOfBlocks:
            self._num_refused += 1
            self._node.grant(request, None, NO_SLOTS)
            return []
        self._incoming[request.xfer] = _Incoming(slots)
        return [request]

    def _diverts(self, event: Event) -> bool:
        """In whatever thread the node works: an arrival is copied at once, not when the engine has time."""
        if not isinstance(event, Arrived):
            return False
        incoming = self._incoming[event.xfer]
        incoming.is_landing = True
        self._loading.submit(partial(self._land, event, incoming))
        return True

    def _land(self, event: Arrived, incoming: _Incoming) -> None:
        num_filled = -(-event.num_tokens // self._block_size)
        self._copies.load(incoming.gate, list(zip(incoming.slots, incoming.blocks, strict=True))[:num_filled])
        self._tell(replace(event, blocks=tuple(incoming.blocks)))

    # ---------------------------------------------------------------- private
    def _free(self, direction: Direction, slots: list[int]) -> None:
        self._slots.free(direction, slots)
        self._serve()

    def _tell(self, event: Event) -> None:
        """For the engine, at its next `poll_events`. Any thread."""
        self._ready.append(event)
        self._wake()

    def _failed(self, error: Exception) -> None:
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            os.eventfd_write(self.wake_fd, 1)
