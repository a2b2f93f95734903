"""Page runs by one-sided writes: posted here, landed when NIXL says so, and only then is COMMIT or FENCED sent.

    move ──post──▶ in flight ──is_done──▶ landed          a write under way cannot be called back: a transfer that
                       └─ error, or nothing lands         ends early waits for its own, or the whole agent is destroyed
                          for so long: the link ends

Nobody announces that a write has landed, so the loop looks: soon at first, then at a quarter of the time that it has
waited, at most each millisecond. Nothing in flight: no looks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from kvstore.clock import Clock
from kvstore.transport.errors import RdmaError
from kvstore.transport.memory import PageMemory
from kvstore.transport.movers import SLICE_BYTES, Pairs
from kvstore.transport.pacer import Pacer
from kvstore.transport.rdma_agent import MAX_DESCRIPTORS, RdmaAgent, Run
from kvstore.transport.transfers import Transfer, XferState

WINDOW_BYTES: Final = 32 << 20  # posted per link: more would only delay the end of a transfer that is abandoned
MAX_LOOK_S: Final = 1e-3
# Where a transfer is over: its engine, or the receiver, waits for the pages, promised 0.2 s after a deadline.
# The end of the agent is the fence, however short the wait. What a short one costs is a link that was only slow: one on
# which no write of 4 MiB (or of all that is posted, at most 32 MiB, if they land together) has landed for so long.
CLOSED_STALL_S: Final = 0.15


@dataclass(slots=True, eq=False)
class _Landing:
    """What a transfer has under way."""

    transfer: Transfer
    since_s: float
    busy_s: float  # of the transfer at that time
    handles: dict[int, int] = field(default_factory=dict)  # -> bytes


class RdmaMover:
    """A Mover. Owned by the `kv` thread; owns its agent.

    Args:
        peer_address: of the peer's region, whose blocks are shaped as ours. NIXL refuses what lies outside of it.
        stall_s: nothing has landed for so long while something was under way: the link is given up.
    """

    def __init__(
        self,
        agent: RdmaAgent,
        own: PageMemory,
        *,
        peer_address: int,
        pacer: Pacer,
        clock: Clock,
        stall_s: float,
    ) -> None:
        self._agent = agent
        self._own = own
        self._peer_address = peer_address
        self._pacer = pacer
        self._clock = clock
        self._stall_s = stall_s
        self._landings: dict[str, _Landing] = {}
        self._num_bytes = 0
        self._moved_s = clock()  # when something was last posted or landed
        self._finishing = ""  # transfer whose COMMIT waits

    def is_ready(self) -> bool:
        """Looks at what is in flight. False while the window is full, or a COMMIT waits for what is under way.

        Raises:
            RdmaError: the peer is gone, or has stalled.
        """
        if not self._landings:
            return True
        self._look()
        if not self._landings:
            return True
        waited_s = self._clock() - self._moved_s
        is_closed = any(landing.transfer.state is XferState.CLOSED for landing in self._landings.values())
        if waited_s >= (min(CLOSED_STALL_S, self._stall_s) if is_closed else self._stall_s):
            raise RdmaError(reason="channel_lost: rdma stalled", detail=f"nothing has landed for {waited_s:.1f} s")
        self._pacer.wake_in(min(waited_s / 4, MAX_LOOK_S))
        return self._num_bytes < WINDOW_BYTES and self._finishing not in self._landings

    def move(self, transfer: Transfer, pairs: Pairs, layer_lo: int, layer_hi: int) -> Iterator[int]:
        """Raises RdmaError: a write cannot be posted."""
        own = self._own
        offset, num_bytes = layer_lo * own.layer_bytes, (layer_hi - layer_lo) * own.layer_bytes
        runs: list[Run] = []
        slice_bytes = 0
        for src, place in pairs:
            source = own.address + src * own.block_bytes + offset
            target = self._peer_address + transfer.dst_blocks[place] * own.block_bytes + offset
            if runs and _goes_on(runs[-1], source, target):
                runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + num_bytes)
            else:
                runs.append((source, target, num_bytes))
            slice_bytes += num_bytes
            if slice_bytes >= SLICE_BYTES or len(runs) == MAX_DESCRIPTORS:
                self._post(transfer, runs, slice_bytes)
                yield slice_bytes
                runs, slice_bytes = [], 0
        if runs:
            self._post(transfer, runs, slice_bytes)
        yield slice_bytes

    def finish(self, transfer: Transfer) -> Iterator[None]:
        """Goes on when all writes of a transfer have landed."""
        self._finishing = transfer.xfer
        while transfer.xfer in self._landings:
            yield
        self._finishing = ""

    def is_landing(self, xfer: str) -> bool:
        return xfer in self._landings

    def close(self) -> None:
        """Nothing of ours is read or written after this, whatever was in flight."""
        self._agent.destroy()
        self._own.drain()
        self._landings.clear()

    def _post(self, transfer: Transfer, runs: list[Run], num_bytes: int) -> None:
        handle = self._agent.post(runs)
        now = self._clock()
        landing = self._landings.setdefault(transfer.xfer, _Landing(transfer, now, transfer.busy_s))
        landing.handles[handle] = num_bytes
        self._num_bytes += num_bytes
        self._moved_s = now
        self._pacer.wake_in(0.0)

    def _look(self) -> None:
        now = self._clock()
        for xfer, landing in list(self._landings.items()):
            for handle in [handle for handle in landing.handles if self._agent.is_done(handle)]:
                self._num_bytes -= landing.handles.pop(handle)
                self._moved_s = now
            if not landing.handles:
                del self._landings[xfer]
                # Posting is in both: the transfer was busy from its first write until its last one had landed.
                landing.transfer.busy_s = max(landing.transfer.busy_s, landing.busy_s + now - landing.since_s)


def _goes_on(run: Run, source: int, target: int) -> bool:
    return (run[0] + run[2], run[1] + run[2]) == (source, target)
