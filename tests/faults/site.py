"""The receiving end of the fault storm: a real node, and an engine that only keeps a pool and looks at what arrives."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kvstore.blocks import BlockPool, OutOfBlocks
from kvstore.readable import wait_readable
from kvstore.transport import Arrived, BlocksFree, KVNode, KVRegion, ReserveRequested
from tests.contract.transport_peer import COMPAT, SECRET
from tests.stopwatch import Stopwatch

BACK_S = 5.0  # every page is back so long after the writer's word or its proven death


class Site:
    """Owned by the thread that calls it. `expected`: per transfer, what the first blocks must hold when it arrives."""

    def __init__(
        self, protocol: str, run_dir: str, *, num_blocks: int, num_layers: int, layer_bytes: int, checksum: bool = True
    ) -> None:
        self.region = KVRegion.create(num_blocks, num_layers, layer_bytes)
        self.node = KVNode(
            incarnation=f"site-{protocol}-{num_layers}",
            region=self.region,
            secret=SECRET,
            compat=COMPAT,
            protocols=(protocol,),
            run_dir=run_dir,
            checksum=checksum,
        )
        self.pool = BlockPool(num_blocks)
        self.expected: dict[str, tuple[bytes, bytes]] = {}  # pages, state
        self.granted: set[str] = set()
        self.num_arrived: dict[str, int] = {}
        self.wrong: list[str] = []
        self.address = self.node.start()
        self._num_blocks = num_blocks

    def turn(self, wait_s: float) -> None:
        """What the engine does between two steps."""
        wait_readable([self.node.wake_fd], wait_s)
        for event in self.node.poll_events():
            if isinstance(event, ReserveRequested):
                self._grant(event)
            elif isinstance(event, Arrived):
                self._take(event)
            elif isinstance(event, BlocksFree):
                self.pool.free(event.blocks)

    def wait_granted(self, xfer: str, *, timeout_s: float) -> None:
        ends_s = time.monotonic() + timeout_s
        while xfer not in self.granted:
            assert time.monotonic() < ends_s, f"{xfer} was not asked for within {timeout_s} s"
            self.turn(0.05)

    def wait_back(self) -> float:
        """Seconds until every block is free. Raises AssertionError: not within `BACK_S`, or an invariant is broken."""
        start_s = time.monotonic()
        with Stopwatch() as watch:
            while not self.is_idle:
                taken_s = time.monotonic() - start_s
                assert taken_s < BACK_S + watch.late_s, (
                    f"{self.pool.num_used} blocks are not back after {taken_s:.1f} s: {self.held}; "
                    f"this machine ran a thread that was due {watch.late_s:.1f} s late"
                )
                self.turn(0.005)
        taken_s = time.monotonic() - start_s
        self.node.check_invariants()
        self.pool.check_invariants()
        return taken_s

    @property
    def is_idle(self) -> bool:
        return self.pool.num_free == self._num_blocks and not self.held

    @property
    def held(self) -> dict[str, int]:
        return {state: count for state, count in self.node.grants().items() if count}

    def close(self) -> None:
        self.node.stop()
        self.region.close()

    def _grant(self, event: ReserveRequested) -> None:
        try:
            blocks = self.pool.allocate(event.num_blocks)
        except OutOfBlocks:
            self.node.grant(event, None, "no_space")
            return
        for block in blocks:  # so that what a page held before is never taken for what should have come
            self.region.block(block)[:] = bytes(self.region.block_bytes)
        self.granted.add(event.xfer)
        self.node.grant(event, blocks)

    def _take(self, event: Arrived) -> None:
        self.num_arrived[event.xfer] = self.num_arrived.get(event.xfer, 0) + 1
        pages = self._pages(event.blocks)
        right, state = self.expected.get(event.xfer, (b"", b""))
        if not right or pages[: len(right)] != right or event.state != state:
            self.wrong.append(event.xfer)
        self.node.settle(event.xfer, True)
        self.pool.free(event.blocks)  # the sequence has ended

    def _pages(self, blocks: Sequence[int]) -> bytes:
        return b"".join(self.region.block(block) for block in blocks)
