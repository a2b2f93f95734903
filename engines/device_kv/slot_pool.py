"""Slots of the bounce region, and how many of them each direction may hold.

    | room that incoming keeps |      whoever comes first      | room that outgoing keeps |

Each direction leaves the other room for one transfer of the largest size. So a push only ever waits for other pushes,
which have what they need and end, and never for grants of this worker, whose writers may themselves wait for slots
of theirs: two workers that push to each other cannot lock each other up.
"""

from __future__ import annotations

from enum import StrEnum

from kvstore.blocks import BlockPool, OutOfBlocks


class Direction(StrEnum):
    OUTGOING = "outgoing"  # pushes of this worker
    INCOMING = "incoming"  # grants to peers


class SlotPool:
    """Identity only: no bytes. Owned by the engine thread.

    Args:
        max_per_transfer: slots of the largest transfer.
    """

    def __init__(self, num_slots: int, *, max_per_transfer: int) -> None:
        assert num_slots >= 2 * max_per_transfer >= 2, f"{num_slots} slots for transfers of {max_per_transfer}"
        self._pool = BlockPool(num_slots)
        self._held = dict.fromkeys(Direction, 0)
        self.max_per_transfer = max_per_transfer

    @property
    def num_slots(self) -> int:
        return self._pool.num_blocks

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    def held(self, direction: Direction) -> int:
        return self._held[direction]

    def allocate(self, direction: Direction, num_slots: int) -> list[int]:
        """All of them for one transfer, or none and an error.

        Raises:
            OutOfBlocks: fewer are free for this direction. The pool is unchanged.
        """
        left = min(self.num_free, self.num_slots - self.max_per_transfer - self._held[direction])
        if num_slots > left:
            raise OutOfBlocks(needed=num_slots, free=left, total=self.num_slots)
        slots = self._pool.allocate(num_slots)
        self._held[direction] += num_slots
        return slots

    def free(self, direction: Direction, slots: list[int]) -> None:
        """Nothing reads or writes them any more."""
        self._pool.free(slots)
        self._held[direction] -= len(slots)

    def check_invariants(self) -> None:
        """Raises AssertionError: a slot is lost, or counted twice."""
        self._pool.check_invariants()
        held = sum(self._held.values())
        assert self.num_free + held == self.num_slots, f"{self.num_free} free, {held} held of {self.num_slots}"
        for direction, count in self._held.items():
            assert 0 <= count <= self.num_slots - self.max_per_transfer, f"{direction} holds {count}"
