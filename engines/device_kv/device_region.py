"""KV at its own addresses, on a GPU or in private memory of the host: what a KV node of rdma serves without a bounce.

Nobody but the device reads the pages: NIXL moves them between addresses, and their digests are computed where they lie.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from engines.device_kv.gates import blocking_event
from engines.device_kv.xxh3 import MIN_BYTES, digests
from kvstore.native.pages import Blocks, CellDigests, Pages, check_bounds
from kvstore.transport import MemoryKind, RegionError

# Hashed at once on a GPU, where a call costs as much as many bytes. It takes four times as much memory for its time.
GPU_SLICE_BYTES: Final = 32 << 20
UNSIGNED: Final = (1 << 64) - 1


class DeviceRegion:
    """A `PageMemory`.

    Args:
        kv: `[num_blocks, num_layers, ...]`, contiguous; kept alive for its address.

    Raises:
        RegionError: a layer of a block is too small for the digests.
    """

    def __init__(self, kv: Tensor) -> None:
        assert kv.is_contiguous(), "blocks of KV follow each other"
        self.num_blocks, self.num_layers = kv.shape[:2]
        self.layer_bytes = kv[0, 0].numel() * kv.itemsize
        if self.layer_bytes < MIN_BYTES:
            found = f"a layer of a block has {self.layer_bytes} bytes, and is checked where it lies"
            raise RegionError(
                what=found, expected=f"at least {MIN_BYTES}: a larger `kv.block_size`, or `kv.direct: off`"
            )
        self.block_bytes = self.num_layers * self.layer_bytes
        self.num_bytes = self.num_blocks * self.block_bytes
        self.address = kv.data_ptr()
        self.pages = Pages(self.address, self.num_blocks, self.num_layers, self.layer_bytes)
        is_gpu = kv.device.type == "cuda"
        self.kind = MemoryKind("vram", kv.get_device()) if is_gpu else MemoryKind()
        self.ops = DeviceHashes(kv)
        self._device = kv.device

    def drain(self) -> None:
        """Wait for all that the device was asked to do: copies over cuda_ipc are in streams of UCX that have no name.

        Raises:
            RuntimeError: the device has failed, or records a graph just now. Then this process must end, as proof.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class DeviceHashes:
    """`PageHashes` of the blocks of `kv`. For one thread, the node's; blocks must be computed and stay as they are."""

    name = "torch"

    def __init__(self, kv: Tensor) -> None:
        self._cells = kv.flatten(0, 1).flatten(1).view(torch.uint8)  # [num_blocks * num_layers, layer_bytes]
        self._stream = torch.cuda.Stream(kv.device) if kv.is_cuda else None  # type: ignore[no-untyped-call]

    def hash(self, own: Pages, blocks: Blocks, *, first: int, lo: int, hi: int, cells: CellDigests) -> None:
        check_bounds(own, blocks, first, lo, hi, cells)
        places = [(place, block) for place, block in enumerate(blocks, first)]
        self._hash(cells, [(p * own.num_layers + layer, block) for p, block in places for layer in range(lo, hi)])

    def fill(self, own: Pages, blocks: Blocks, *, cells: CellDigests, start: int, max_bytes: int) -> int:
        check_bounds(own, blocks, 0, 0, own.num_layers, cells)
        most = max(1, (max_bytes if self._stream is None else GPU_SLICE_BYTES) // own.layer_bytes)
        wanted: list[tuple[int, int]] = []
        cell, num_cells = start, len(blocks) * own.num_layers
        while cell < num_cells and len(wanted) < most:
            block = blocks[cell // own.num_layers]
            if cells.sources[cell] != block:
                wanted.append((cell, block))
            cell += 1
        self._hash(cells, wanted)
        return cell

    def _hash(self, cells: CellDigests, wanted: list[tuple[int, int]]) -> None:
        """Each (cell, block), in slices that bound the memory this takes."""
        num_layers, layer_bytes = cells.num_layers, self._cells.shape[1]
        step = max(1, GPU_SLICE_BYTES // layer_bytes)
        for start in range(0, len(wanted), step):
            part = wanted[start : start + step]
            rows = [block * num_layers + cell % num_layers for cell, block in part]
            for (cell, block), digest in zip(part, self._digests(rows), strict=True):
                cells.digests[cell], cells.sources[cell] = digest & UNSIGNED, block

    def _digests(self, rows: list[int]) -> list[int]:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            found = digests(self._cells[torch.tensor(rows, device=self._cells.device)])
            if self._stream is not None:
                done = blocking_event()
                done.record(self._stream)
                done.synchronize()
            return [int(value) for value in found.tolist()]
