"""Incoming grants of a bounced node: peers write into slots, which are copied into the engine's blocks on arrival."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from engines.device_kv.slot_pool import Direction, SlotPool
from kvstore.transport import Arrived, BlocksFree

if TYPE_CHECKING:
    from engines.device_kv.copies import Copies
    from engines.device_kv.gates import Gate
    from engines.device_kv.lane import Lane


@dataclass(slots=True, eq=False)
class _Landing:
    """A grant of ours: a peer writes into `slots[i]` what belongs into `blocks[i]`.

    Attributes:
        is_landing: its pages are verified and are being copied.
        is_told: the engine has heard of the arrival.
    """

    slots: list[int]
    blocks: list[int] = field(default_factory=list)
    gate: Gate = None
    is_landing: bool = False
    is_told: bool = False


class Landings:
    """Owned by the engine thread, but for `land` and `told`; copies run in the lane.

    Args:
        tell: takes an event for the engine, in the lane.
    """

    def __init__(
        self,
        slots: SlotPool,
        copies: Copies,
        lane: Lane,
        *,
        block_size: int,
        tell: Callable[[Arrived | BlocksFree], None],
    ) -> None:
        self._slots = slots
        self._copies = copies
        self._lane = lane
        self._block_size = block_size
        self._tell = tell
        self._landings: dict[str, _Landing] = {}

    @property
    def slots_in_use(self) -> list[int]:
        return [slot for landing in self._landings.values() for slot in landing.slots]

    def add(self, xfer: str, num_slots: int) -> None:
        """Set slots aside for a transfer that asks for a grant.

        Raises:
            OutOfBlocks: there are not so many; nothing has changed.
        """
        self._landings[xfer] = _Landing(self._slots.allocate(Direction.INCOMING, num_slots))

    def granted(self, xfer: str, blocks: list[int]) -> list[int]:
        """The engine gives `blocks`: the slots that the peer is told of. The copy waits for what it computes now."""
        landing = self._landings[xfer]
        if len(blocks) != len(landing.slots):
            raise ValueError(f"{len(blocks)} blocks for {xfer}, which asks for {len(landing.slots)}")
        landing.blocks, landing.gate = list(blocks), self._copies.gate()
        return landing.slots

    def land(self, event: Arrived) -> None:
        """Its slots are complete and verified: copy them, then tell. For any thread."""
        landing = self._landings[event.xfer]
        landing.is_landing = True
        self._lane.submit(partial(self._copy, event, landing))

    def told(self, xfer: str) -> None:
        """The engine has heard of the arrival; it may have settled it, too. For any thread."""
        landing = self._landings.get(xfer)
        if landing is not None:
            landing.is_told = True

    def behind_copy(self, event: BlocksFree) -> bool:
        """True if the arrival must be told first; then `event` is told behind it."""
        landing = self._landings[event.xfer]
        if not landing.is_landing or landing.is_told:
            return False
        self._lane.submit(partial(self._tell, event))
        return True

    def end(self, xfer: str) -> tuple[int, ...]:
        """Nobody writes its slots any more; the blocks it was for. () if it is not known."""
        landing = self._landings.pop(xfer, None)
        if landing is None:
            return ()
        self._slots.free(Direction.INCOMING, landing.slots)
        return tuple(landing.blocks)

    def _copy(self, event: Arrived, landing: _Landing) -> None:
        num_filled = -(-event.num_tokens // self._block_size)
        self._copies.load(landing.gate, list(zip(landing.slots, landing.blocks, strict=True))[:num_filled])
        self._tell(replace(event, blocks=tuple(landing.blocks)))
