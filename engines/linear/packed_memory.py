"""Memory for packed weights: anonymous, in huge pages where the kernel gives them.

A step reads every weight once, so with 4 KiB pages it also reads a page-table entry for each. Weights share large maps:
a map of its own for each would leave most of a huge page empty.
"""

from __future__ import annotations

import logging
import mmap
from typing import Final

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAP_BYTES: Final = 32 << 20
_HUGE_PAGE: Final = 2 << 20
_LINE: Final = 64


class PackedMemory:
    """Gives memory away and never takes it back: a map lives as long as a tensor in it. One thread."""

    def __init__(self) -> None:
        self._map: Tensor = torch.empty(0, dtype=torch.uint8)

    def empty(self, num_bytes: int) -> Tensor:
        """uint8 `[num_bytes]`, zeros, aligned to 64 bytes; from a fresh map to 2 MiB."""
        taken = -(-num_bytes // _LINE) * _LINE
        if taken > self._map.shape[0]:
            self._map = _huge_map(max(MAP_BYTES, taken))
        found, self._map = self._map[:num_bytes], self._map[taken:]
        return found

    def copy(self, source: Tensor) -> Tensor:
        """`source` in this memory, contiguous, of the same shape and dtype."""
        room = self.empty(source.numel() * source.element_size()).view(source.dtype).view(source.shape)
        return room.copy_(source)


def _huge_map(num_bytes: int) -> Tensor:
    size = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    pages = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    begin = -memory.data_ptr() % _HUGE_PAGE
    try:
        pages.madvise(mmap.MADV_HUGEPAGE, begin, size)
    except OSError as error:
        # A kernel without huge pages: as fast as malloc, so nothing to stop for.
        logger.info("no huge pages for weights: %s", error)
    return memory[begin : begin + size]
