"""Blocks of a device as bytes on the host, one at a time: for the tiers of the prefix cache."""

from __future__ import annotations

import torch
from torch import Tensor


class StagedBlocks:
    """One block at a time. Owned by the engine thread.

    Args:
        kv: `[num_blocks, ...]`, on any device.
    """

    def __init__(self, kv: Tensor) -> None:
        self._kv = kv
        self._stage = torch.empty(kv.shape[1:], dtype=kv.dtype, pin_memory=kv.device.type != "cpu")
        self._bytes = self._stage.flatten().view(torch.uint8).numpy().data

    def read(self, block_id: int) -> memoryview:
        """The bytes of a block, until the next call. Blocks until they are here."""
        with torch.inference_mode():
            self._stage.copy_(self._kv[block_id])
        return self._bytes

    def write_back(self, block_id: int) -> None:
        """Put what has been written into the view into the block."""
        with torch.inference_mode():
            self._kv[block_id].copy_(self._stage)
