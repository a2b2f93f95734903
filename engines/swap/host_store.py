"""KV of preempted sequences in host memory: one page per block, copied and checksummed. Owns no decision.

On a CPU both sides are plain memory and the store is room beyond the region; on a GPU the pages are pinned, so that the
same copies go over the bus without a bounce. A page is checked before it goes back: KV that changed is never decoded.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor


class HostStore:
    """Owned by the engine thread.

    Args:
        kv: the region, `[num_blocks, ...]`, on any device. Block-major: `kv[i]` is one run of memory.
        num_pages: the store's size. Its memory is touched only as it is used.
    """

    def __init__(self, kv: Tensor, num_pages: int) -> None:
        self._kv = kv
        is_device = kv.device.type != "cpu"
        self._pages = torch.empty((num_pages, *kv.shape[1:]), dtype=kv.dtype, pin_memory=is_device)
        self._digests = [0] * num_pages
        self.page_bytes = self._pages[0].numel() * kv.itemsize

    def save(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy (block, page) each into the store. Blocks until it is there."""
        with torch.inference_mode():
            for block, page in pairs:
                self._pages[page].copy_(self._kv[block])
                self._digests[page] = self._digest(self._pages[page])

    def load(self, pairs: Iterable[tuple[int, int]]) -> bool:
        """Copy (block, page) each back into the region. False: a page is not what was saved; the blocks are garbage."""
        with torch.inference_mode():
            for block, page in pairs:
                if self._digest(self._pages[page]) != self._digests[page]:
                    return False
                self._kv[block].copy_(self._pages[page])
        return True

    def measure(self, num_rounds: int = 4) -> float:
        """Seconds of one copy of one block with its checksum, the fastest of a few out of the region. Writes page 0."""
        seconds = []
        for _ in range(num_rounds):
            started_s = time.perf_counter()
            self.save([(0, 0)])
            seconds.append(time.perf_counter() - started_s)
        return min(seconds)

    @staticmethod
    def _digest(page: Tensor) -> int:
        return int(xxhash.xxh3_64_intdigest(page.view(torch.uint8).numpy().data))
