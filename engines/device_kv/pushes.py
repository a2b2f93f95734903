"""Outgoing transfers of a bounced node: which slots each has, what waits for slots, what is copied into them.

push, commit ──no slots yet──▶ waits, first come, first served ──all slots of the transfer──▶ job of the lane
job of the lane: copy device blocks into slots, then hand the slots to the node
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from engines.device_kv.slot_pool import Direction, SlotPool
from kvstore.blocks import OutOfBlocks

if TYPE_CHECKING:
    from engines.device_kv.copies import Copies
    from engines.device_kv.gates import Gate
    from engines.device_kv.lane import Lane

Pairs = list[tuple[int, int]]


class PushPort(Protocol):
    """Of the node: what the lane calls. Block ids are slots."""

    @property
    def num_layers(self) -> int: ...
    def push(self, xfer: str, pairs: Pairs, layer_lo: int, layer_hi: int) -> None: ...
    def commit(self, xfer: str, *, src_blocks: list[int], num_tokens: int, state: bytes) -> None: ...


@dataclass(slots=True, eq=False)
class _Push:
    """A transfer of ours. `slots[i]` is for place i, once it has any.

    Attributes:
        sources: per layer of a place the block that was pushed for it; -1: none. As `CellDigests.sources`.
        waiting: what is to be done as soon as there are slots, in order.
        num_submitted, num_done: jobs; the first is written by the engine thread, the second by the lane.
        is_over: nothing of it need be copied any more.
        is_ending: its end waits behind its copies, and so does whatever follows.
    """

    num_slots: int
    sources: array[int]
    slots: list[int] = field(default_factory=list)
    waiting: deque[Callable[[], None]] = field(default_factory=deque)
    num_submitted: int = 0
    num_done: int = 0
    is_over: bool = False
    is_ending: bool = False


class Pushes:
    """Owned by the engine thread; jobs run in the lane."""

    def __init__(self, node: PushPort, slots: SlotPool, copies: Copies, lane: Lane) -> None:
        self._node = node
        self._slots = slots
        self._copies = copies
        self._lane = lane
        self._pushes: dict[str, _Push] = {}
        self._queue: deque[str] = deque()  # those that wait for slots, the oldest first
        self.num_waited = 0  # transfers that found no slots at their first push

    def __contains__(self, xfer: object) -> bool:
        return xfer in self._pushes

    @property
    def slots_in_use(self) -> list[int]:
        return [slot for push in self._pushes.values() for slot in push.slots]

    def add(self, xfer: str, num_slots: int) -> None:
        """A transfer of `num_slots` places; it takes slots with its first push."""
        self._pushes[xfer] = _Push(num_slots, array("q", [-1]) * (num_slots * self._node.num_layers))

    def push(self, xfer: str, pairs: Pairs, lo: int, hi: int) -> None:
        """Layers of blocks, (block, place) each, as the compute so far leaves them. Nothing if the transfer is over."""
        push = self._pushes.get(xfer)
        if push is None or push.is_over:
            return
        num_layers, taken = self._node.num_layers, list(pairs)
        for block, place in taken:
            first = place * num_layers
            push.sources[first + lo : first + hi] = array("q", [block]) * (hi - lo)
        gate = self._copies.gate()
        self._when_slots(xfer, push, lambda: self._save(xfer, push, gate, taken, lo, hi))

    def commit(self, xfer: str, src_blocks: list[int], num_tokens: int, state: bytes) -> None:
        """Behind all pushes. Of `src_blocks`, what none of them has moved moves now.

        The node would find such a page by its checksum over our blocks; over slots it would compare leftovers.
        """
        push = self._pushes.get(xfer)
        if push is None or push.is_over:
            return
        num_layers = self._node.num_layers
        missing = [
            (block, place)
            for place, block in enumerate(src_blocks)
            if push.sources[place * num_layers : (place + 1) * num_layers] != array("q", [block]) * num_layers
        ]
        if missing:
            self.push(xfer, missing, 0, num_layers)
        num_blocks = len(src_blocks)

        def commit() -> None:
            slots = push.slots[:num_blocks]
            self._submit(push, lambda: self._node.commit(xfer, src_blocks=slots, num_tokens=num_tokens, state=state))

        self._when_slots(xfer, push, commit)

    def drop(self, xfer: str) -> None:
        """Copy no more of it. Its slots stay its own until `end`."""
        push = self._pushes.get(xfer)
        if push is None:
            return
        push.is_over = True
        if push.waiting:
            push.waiting.clear()
            self._queue.remove(xfer)
            self.serve()

    def behind_copies(self, xfer: str, told: Callable[[], None]) -> bool:
        """True if copies of it may be under way: they read the engine's blocks; `told` is called behind them."""
        push = self._pushes[xfer]
        if not push.is_ending and push.num_done == push.num_submitted:
            return False
        push.is_ending = True
        self._submit(push, told)
        return True

    def end(self, xfer: str) -> None:
        """The node reads its slots no more, and nothing is copied into them. Safe to repeat."""
        self.drop(xfer)
        push = self._pushes.pop(xfer, None)
        if push is not None and push.slots:
            self._slots.free(Direction.OUTGOING, push.slots)
            self.serve()

    def serve(self) -> None:
        """Slots may be free: give them to those who wait. Strictly in turn, so that a large transfer gets its own."""
        while self._queue:
            push = self._pushes[self._queue[0]]
            try:
                push.slots = self._slots.allocate(Direction.OUTGOING, push.num_slots)
            except OutOfBlocks:
                return
            self._queue.popleft()
            while push.waiting:
                push.waiting.popleft()()

    # ---------------------------------------------------------------- private
    def _when_slots(self, xfer: str, push: _Push, action: Callable[[], None]) -> None:
        if push.slots:
            action()
            return
        is_first = not push.waiting
        push.waiting.append(action)
        if is_first:
            self._queue.append(xfer)
            self.serve()
            self.num_waited += not push.slots

    def _save(self, xfer: str, push: _Push, gate: Gate, pairs: Pairs, lo: int, hi: int) -> None:
        to_slots = [(block, push.slots[place]) for block, place in pairs]
        to_peer = [(push.slots[place], place) for _, place in pairs]

        def job() -> None:
            if not push.is_over:
                self._copies.save(gate, to_slots, lo, hi)
                self._node.push(xfer, to_peer, lo, hi)

        self._submit(push, job)

    def _submit(self, push: _Push, job: Callable[[], None]) -> None:
        def counted() -> None:
            job()
            push.num_done += 1

        push.num_submitted += 1
        self._lane.submit(counted)
