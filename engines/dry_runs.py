"""One block to each decode worker as soon as it is heard of: a pair that does not work fails now, by name.

Peers(d0, d1) ──▶ for each new one: reserve, push, commit of one block under the request id "dry-run"
receiver: gives it a block, verifies it, refuses the hand-over, takes the block back. Its front never hears of it.
REFUSED(handoff) ──▶ the pair works: listeners, secret, layout, mapping, every byte
anything else    ──▶ logged; a pair that cannot work is left out of the targets, and tried again every 5 s
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Final

from engines.messages import Target
from kvstore import transport as kv
from kvstore.blocks import OutOfBlocks

if TYPE_CHECKING:
    from kvstore.blocks import BlockPool
    from kvstore.clock import Clock

logger = logging.getLogger(__name__)

DRY_RUN_RID: Final = "dry-run"  # no request is called so: their ids name a shard
RETRY_S: Final = 5.0
LIMIT_S: Final = 5.0
# Of these, time heals none: the other end, or the way there, must change first.
HOPELESS: Final = frozenset(
    {"auth", "incompatible", "layout", "version", "protocol", "credentials", "region", "checksum", "unreachable"}
)

# The pair has met and agrees; there was no block just now.
LATER: Final = frozenset({"no_space", "no_slots", "quota", "backoff"})


@dataclass(slots=True, eq=False)
class _Pair:
    """One decode worker's life, by its incarnation."""

    target: Target
    is_proven: bool = False
    fault: str = ""
    xfer: str = ""  # under way
    block: int = -1
    next_s: float = 0.0


class DryRuns:
    """Owned by the engine thread of a worker that pushes."""

    def __init__(self, *, node: kv.KVPort, pool: BlockPool, block_size: int, incarnation: str, clock: Clock) -> None:
        self._kv = node
        self._pool = pool
        self._block_size = block_size
        self._clock = clock
        self._names = (f"{incarnation}.dry-run.{n}" for n in count(1))
        self._targets: list[Target] = []
        self._pairs: dict[str, _Pair] = {}
        self._running: dict[str, _Pair] = {}  # by transfer; also of workers that have left meanwhile

    def meet(self, targets: list[Target]) -> None:
        """The decode workers there are now. Those that are new get their dry run."""
        known, self._targets = self._pairs, targets
        self._pairs = {
            target.address.incarnation: known.get(target.address.incarnation) or _Pair(target) for target in targets
        }
        self.turn()

    @property
    def usable(self) -> list[Target]:
        """In the order they came, without those that cannot work; one that is not proven yet may be used."""
        return [t for t in self._targets if self._pairs[t.address.incarnation].fault not in HOPELESS]

    def turn(self) -> None:
        """Start what is due."""
        now = self._clock()
        for pair in self._pairs.values():
            if not pair.is_proven and not pair.xfer and now >= pair.next_s:
                self._start(pair, now)

    def next_wakeup_s(self) -> float | None:
        waiting = (pair.next_s for pair in self._pairs.values() if not pair.is_proven and not pair.xfer)
        return min(waiting, default=None)

    def owns(self, xfer: str) -> bool:
        return xfer in self._running

    def on_event(self, event: kv.Event) -> None:
        """An event of a transfer that is ours."""
        pair = self._running[event.xfer]
        match event:
            case kv.GrantReceived(xfer):
                self._kv.push(xfer, [(pair.block, 0)], 0, self._kv.num_layers)
                self._kv.commit(xfer, src_blocks=[pair.block], num_tokens=self._block_size, state=b"")
            case kv.Refused():
                self._end(pair, "")
            case kv.GrantRefused(_, reason, detail):
                self._end(pair, reason, detail)
            case kv.PushFailed(_, reason):
                self._end(pair, reason)
            case kv.Handed() | kv.SourceFree():
                self._end(pair, "protocol")  # a receiver takes no dry run for a request

    def _start(self, pair: _Pair, now: float) -> None:
        pair.next_s = now + RETRY_S
        try:
            (pair.block,) = self._pool.allocate(1)
        except OutOfBlocks:
            return
        pair.xfer = next(self._names)
        self._running[pair.xfer] = pair
        self._kv.reserve(
            pair.target.address,
            pair.xfer,
            rid=DRY_RUN_RID,
            epoch=0,
            token=DRY_RUN_RID,
            num_blocks=1,
            num_tokens=self._block_size,
            deadline_s=LIMIT_S,
        )

    def _end(self, pair: _Pair, fault: str, detail: str = "") -> None:
        """The node reads the block no more, whatever the end was."""
        del self._running[pair.xfer]
        self._pool.free([pair.block])
        pair.xfer, pair.next_s = "", self._clock() + RETRY_S
        if fault and fault != pair.fault and fault not in LATER:
            what = "is left out until it works" if fault in HOPELESS else "will be tried again"
            why = f" ({detail})" if detail else ""
            logger.warning("kv: dry run with %s failed (%s)%s: it %s", pair.target.node, fault, why, what)
        if not fault:
            logger.info("kv: dry run with %s: every byte arrived", pair.target.node)
        pair.is_proven, pair.fault = not fault, fault
