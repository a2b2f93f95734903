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
from collections.abc import Callable
from functools import partial
from typing import Final

from engines.device_kv.copies import Copies
from engines.device_kv.landings import Landings
from engines.device_kv.lane import Lane
from engines.device_kv.port_around import PortAround
from engines.device_kv.pushes import Pairs, Pushes
from engines.device_kv.slot_pool import Direction, SlotPool
from kvstore.address import KVAddress
from kvstore.blocks import OutOfBlocks
from kvstore.transport import (
    Arrived,
    BlocksFree,
    Event,
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


class BouncedNode(PortAround):
    """A `KVPort`. All methods are for the engine thread.

    Args:
        node: serves the bounce region; not started yet. `push` and `commit` are called from the outgoing lane.
        slots: of that region.
        block_size: tokens per block.
        make_lane: from a name and what is to be told of a failure.
    """

    def __init__(
        self,
        node: KVPort,
        slots: SlotPool,
        copies: Copies,
        *,
        block_size: int,
        make_lane: Callable[[str, Callable[[Exception], None]], Lane],
    ) -> None:
        super().__init__(node)
        self._slots = slots
        self._saving = make_lane("kv-copy-out", self._failed)
        self._loading = make_lane("kv-copy-in", self._failed)
        self._pushes = Pushes(node, slots, copies, self._saving)
        self._landings = Landings(slots, copies, self._loading, block_size=block_size, tell=self._landed)
        self._ready: deque[Event] = deque()  # of the lanes, for the engine
        self._failure: Exception | None = None
        self._takes: Callable[[Event], bool] | None = None
        self._num_refused = 0
        node.divert(self._lands)

    # ---------------------------------------------------------------- life
    def divert(self, takes: Callable[[Event], bool]) -> None:
        """As `KVNode.divert`, of arrivals only: in the incoming lane, once they are copied."""
        self._takes = takes

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
        self._pushes.add(xfer, num_blocks)
        super().reserve(
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
        """As `KVNode.push`, of what the engine thread has asked the device to compute so far."""
        self._pushes.push(xfer, pairs, layer_lo, layer_hi)

    def commit(self, xfer: str, *, src_blocks: list[int], num_tokens: int, state: bytes) -> None:
        """As `KVNode.commit`; what no push has moved of `src_blocks` is pushed first."""
        self._pushes.commit(xfer, src_blocks, num_tokens, state)

    def abandon(self, xfer: str) -> None:
        self._pushes.drop(xfer)
        self._node.abandon(xfer)

    # ---------------------------------------------------------------- receiver
    def grant(self, request: ReserveRequested, blocks: list[int] | None, reason: str = "") -> None:
        """As `KVNode.grant`: the slots were set aside when the engine was asked."""
        if blocks is not None:
            self._node.grant(request, self._landings.granted(request.xfer, blocks), reason)
            return
        self._landings.end(request.xfer)
        self._node.grant(request, None, reason)
        self._pushes.serve()

    def settle(self, xfer: str, handed: bool) -> None:
        self._node.settle(xfer, handed)
        if handed:
            self._landings.end(xfer)
            self._pushes.serve()

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
            told.append(self._final(self._ready.popleft()))
        return told

    def counters(self) -> dict[str, float]:
        """Those of the node, and: bounce_waits (pushes that waited for slots), bounce_refusals (grants without)."""
        mine = {"bounce_waits": float(self._pushes.num_waited), "bounce_refusals": float(self._num_refused)}
        return {**self._node.counters(), **mine}

    def check_invariants(self) -> None:
        """Of the node, and: each slot is free or of one transfer. Raises AssertionError."""
        self._node.check_invariants()
        self._slots.check_invariants()
        outgoing, incoming = self._pushes.slots_in_use, self._landings.slots_in_use
        assert len({*outgoing, *incoming}) == len(outgoing) + len(incoming), "a slot is of two transfers"
        held = (self._slots.held(Direction.OUTGOING), self._slots.held(Direction.INCOMING))
        assert held == (len(outgoing), len(incoming)), f"slots held {held}, used {len(outgoing)}, {len(incoming)}"

    # ---------------------------------------------------------------- events
    def _lands(self, event: Event) -> bool:
        """In whatever thread the node works: an arrival is copied at once, not when the engine has time."""
        if isinstance(event, Arrived):
            self._landings.land(event)
            return True
        return False

    def _on_event(self, event: Event) -> list[Event]:
        """What the engine is told now of an event of the node."""
        match event:
            case ReserveRequested():
                return self._on_reserve(event)
            case BlocksFree():
                return [] if self._landings.behind_copy(event) else [self._final(event)]
            case Handed() | Refused() | PushFailed() | SourceFree() | GrantRefused() if event.xfer in self._pushes:
                self._pushes.drop(event.xfer)
                is_later = self._pushes.behind_copies(event.xfer, partial(self._tell, event))
                return [] if is_later else [self._final(event)]
        return [event]

    def _on_reserve(self, request: ReserveRequested) -> list[Event]:
        """Slots before the engine is asked: with none it need not take blocks."""
        reason = TOO_LARGE
        if request.num_blocks <= self._slots.max_per_transfer:
            try:
                self._landings.add(request.xfer, request.num_blocks)
                return [request]
            except OutOfBlocks:
                self._num_refused += 1
                reason = NO_SLOTS
        self._node.grant(request, None, reason)
        return []

    def _final(self, event: Event) -> Event:
        """An event behind which no copy is under way, as the engine is told it."""
        match event:
            case Arrived():
                self._landings.told(event.xfer)
            case BlocksFree():
                event = BlocksFree(self._landings.end(event.xfer), event.xfer)
                self._pushes.serve()
            case _:
                self._pushes.end(event.xfer)
        return event

    # ---------------------------------------------------------------- private
    def _landed(self, event: Arrived | BlocksFree) -> None:
        """From the incoming lane."""
        if isinstance(event, Arrived) and self._takes is not None and self._takes(event):
            self._landings.told(event.xfer)
        else:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        """For the engine, at its next `poll_events`. Any thread."""
        self._ready.append(event)
        self._wake()

    def _failed(self, error: Exception) -> None:
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError, ValueError):  # ValueError: the node has closed it
            os.eventfd_write(self.wake_fd, 1)
