"""Host memory in front, a disk behind it, and the thread that reads and writes the disk.

The engine thread never waits for the disk: it spills into host memory, asks for what it may need (`prefetch`), and
takes what has come back between two steps (`poll`). Under load the write-behind is the first thing that is dropped.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from queue import SimpleQueue

from kvstore.tiers.disk_tier import DiskTier
from kvstore.tiers.host_tier import HostTier

MAX_QUEUED_BYTES = 64 << 20  # of blocks on their way to the disk


@dataclass
class TierStats:
    """Blocks, totals since the start."""

    spilled: int = 0
    restored: int = 0
    prefetched: int = 0  # from the disk into host memory
    damaged: int = 0
    dropped_writes: int = 0


@dataclass(frozen=True, slots=True)
class _Job:
    """For the disk thread: write `pages`, or read if there are none."""

    key: bytes
    pages: bytes | None = None


@dataclass(frozen=True, slots=True)
class _Result:
    """Of the disk thread. `pages`: what a read found; `num_written`: bytes that wait no more."""

    key: bytes
    pages: bytes | None = None
    num_written: int = 0
    is_read: bool = False
    is_gone: bool = False


class TieredStore:
    """All calls from the engine thread; `DiskTier` belongs to the store's own thread from here on."""

    def __init__(
        self,
        host: HostTier,
        disk: DiskTier | None = None,
        *,
        pages: Callable[[int], memoryview],
        landed: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`pages(block_id)`: the bytes of a block of the region. `landed` is told of each that was written into."""
        self._pages = pages
        self._landed = landed
        self._stats = TierStats()
        self._host = host
        self._disk = disk
        self._on_disk: set[bytes] = set()  # what the engine thread knows of the disk
        self._wanted: set[bytes] = set()  # reads under way
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._results: deque[_Result] = deque()
        self._num_queued_bytes = 0
        self._thread: threading.Thread | None = None
        if disk is not None:
            self._on_disk.update(disk.keys())
            disk.on_forget = lambda key: self._results.append(_Result(key, is_gone=True))
            self._thread = threading.Thread(target=self._run, args=(disk,), name="kv-tiers", daemon=True)
            self._thread.start()

    @property
    def num_host_blocks(self) -> int:
        return len(self._host)

    @property
    def num_disk_blocks(self) -> int:
        return len(self._on_disk)

    @property
    def stats(self) -> TierStats:
        num_damaged = 0 if self._disk is None else self._disk.num_damaged
        return replace(self._stats, damaged=self._stats.damaged + num_damaged)

    def spill(self, key: bytes, block_id: int) -> None:
        """Keep a block that the region is about to overwrite."""
        pages = self._pages(block_id)
        self._stats.spilled += 1
        self._host.put(key, pages)
        if self._disk is None or key in self._on_disk:
            return
        if self._num_queued_bytes + len(pages) > MAX_QUEUED_BYTES:
            self._stats.dropped_writes += 1
            return
        self._num_queued_bytes += len(pages)
        self._on_disk.add(key)
        self._jobs.put(_Job(key, bytes(pages)))

    def restore(self, key: bytes, block_id: int) -> bool:
        """Copy a block from host memory into the region, verified. False: compute it; the block may be garbage."""
        found = self._host.read_into(key, self._pages(block_id))
        if found:
            self._landed(block_id)
        self._stats.restored += found is True
        self._stats.damaged += found is False
        return found is True

    def prefetch(self, keys: Iterable[bytes]) -> frozenset[bytes]:
        """Bring blocks of one chain from the disk into host memory; those that `poll` still has to bring.

        Stops at the first key that no tier has, and at half of host memory: a chain must not push itself out.
        """
        pending: set[bytes] = set()
        for key in islice(keys, max(1, self._host.num_slots // 2)):
            if key in self._host:
                continue
            if key not in self._on_disk:
                break
            if key not in self._wanted:
                self._wanted.add(key)
                self._jobs.put(_Job(key))
            pending.add(key)
        return frozenset(pending)

    def is_pending(self, keys: frozenset[bytes]) -> bool:
        """Whether a read of any of them is under way."""
        return not self._wanted.isdisjoint(keys)

    def poll(self) -> None:
        """Take what the disk thread has done."""
        while self._results:
            result = self._results.popleft()
            self._num_queued_bytes -= result.num_written
            if result.is_gone:
                self._on_disk.discard(result.key)
            if result.is_read:
                self._wanted.discard(result.key)
            if result.pages is not None:
                self._stats.prefetched += 1
                self._host.put(result.key, memoryview(result.pages))

    def close(self, timeout_s: float = 5.0) -> None:
        """Write what is queued, then end the thread. Safe to repeat."""
        thread, self._thread = self._thread, None
        if thread is not None and self._disk is not None:
            self._jobs.put(None)
            thread.join(timeout_s)
            if not thread.is_alive():
                self._disk.close()

    def _run(self, disk: DiskTier) -> None:
        while (job := self._jobs.get()) is not None:
            if job.pages is None:
                self._results.append(_Result(job.key, disk.read(job.key), is_read=True))
                continue
            is_kept = disk.put(job.key, job.pages)
            self._results.append(_Result(job.key, num_written=len(job.pages), is_gone=not is_kept))
