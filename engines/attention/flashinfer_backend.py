"""Paged attention by FlashInfer's GPU kernels: pages are read where they are, as blocks of the region lie (HND).

    steps of decode rows alone      BatchDecodeWithPagedKVCacheWrapper, and the same with fixed buffers in graphs
    all others                      BatchPrefillWithPagedKVCacheWrapper, causal; a decode row is a chunk of one

`plan` once per step, `run` per layer. What the host knows stays there: `plan` reads lengths on the host, and would wait
for the device to bring them back. After FlashInfer (Ye et al., MLSys 2025) and docs.flashinfer.ai.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.attention.padded_decode import DecodeTensors, PaddedWrites

HEAD_DIMS: Final = frozenset({64, 128, 256})
DTYPES: Final = frozenset({torch.float16, torch.bfloat16})
WORKSPACE_BYTES: Final = 128 << 20  # what its documentation recommends
# Query heads per KV head from which a decode step is a matrix product large enough for tensor cores; the plain kernels
# are compiled for powers of two below.
PLAIN_GROUPS: Final = frozenset({1, 2})


def find_flashinfer() -> Any | None:
    """The package, None where it is not installed or does not load."""
    try:
        return importlib.import_module("flashinfer")
    except (ImportError, OSError, RuntimeError):
        return None


class FlashInferAttention:
    """`kv` is the region `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, or some of its heads. One
    thread only.

    Args:
        flashinfer: the package.
    """

    def __init__(self, kv: Tensor, num_heads: int, flashinfer: Any) -> None:
        self._kv = kv
        self._flashinfer = flashinfer
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=kv.device)
        self._num_heads, self._block_size = num_heads, kv.shape[4]
        self._shape = _shape_arguments(kv, num_heads)
        self._layers = _layers_of(kv)
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self._workspace, "HND", use_tensor_cores=_wants_tensor_cores(kv, num_heads)
        )
        self._prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND")
        self._planned = self._decode
        self._blocks = self._offsets = torch.empty(0, dtype=torch.int64, device=kv.device)

    def begin_step(self, metadata: AttentionMetadata) -> None:
        self._blocks = torch.div(metadata.slot_mapping, self._block_size, rounding_mode="floor")
        self._offsets = metadata.slot_mapping % self._block_size
        pages = _pages_of(metadata.rows, self._block_size, self._kv.device)
        num_new = np.array([row.num_new_tokens for row in metadata.rows], dtype=np.int32)
        if (num_new == 1).all():
            self._planned = self._decode
            self._decode.plan(*pages, *self._shape, **_options(self._kv))
        else:
            self._planned = self._prefill
            self._prefill.plan(_indptr(num_new), *pages, *self._shape, causal=True, **_options(self._kv))

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._kv[:, layer, 0][self._blocks, :, self._offsets] = k
        self._kv[:, layer, 1][self._blocks, :, self._offsets] = v

    def forward(self, layer: int, q: Tensor) -> Tensor:
        out: Tensor = self._planned.run(q.contiguous(), self._layers[layer])
        return out

    def for_graph(self, inputs: DecodeTensors) -> FlashInferDecodeGraph:
        """The same kernels for decode steps that are recorded. No two graphs run at once: they share work space."""
        return FlashInferDecodeGraph(self._kv, self._num_heads, self._flashinfer, self._workspace, inputs)


class FlashInferDecodeGraph:
    """A `GraphAttention`. One thread only."""

    def __init__(self, kv: Tensor, num_heads: int, flashinfer: Any, workspace: Tensor, inputs: DecodeTensors) -> None:
        num_rows, num_pages = inputs.tables.shape
        self._kv = kv
        self._block_size = kv.shape[4]
        self._shape = _shape_arguments(kv, num_heads)
        self._layers = _layers_of(kv)
        self._writes = PaddedWrites(kv, inputs)
        indptr, indices, last = (
            torch.zeros(size, dtype=torch.int32, device=kv.device)
            for size in (num_rows + 1, num_rows * num_pages, num_rows)
        )
        self._decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=_wants_tensor_cores(kv, num_heads),
            paged_kv_indptr_buffer=indptr,
            paged_kv_indices_buffer=indices,
            paged_kv_last_page_len_buffer=last,
        )

    def plan(self, contexts: NDArray[np.int64], tables: NDArray[np.int64]) -> None:
        num_pages = -(-contexts // self._block_size)
        indices = tables[np.arange(tables.shape[1]) < num_pages[:, None]].astype(np.int32)
        last = (contexts - (num_pages - 1) * self._block_size).astype(np.int32)
        pages = (_indptr(num_pages), torch.from_numpy(indices).to(self._kv.device), torch.from_numpy(last))
        self._decode.plan(*pages, *self._shape, **_options(self._kv))

    def begin(self) -> None:
        self._writes.begin()

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._writes.write_kv(layer, k, v)

    def forward(self, layer: int, q: Tensor) -> Tensor:
        out: Tensor = self._decode.run(q.contiguous(), self._layers[layer])
        return out


def _pages_of(rows: Sequence[AttentionRow], block_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr, indices, tokens in the last page), int32: all rows end to end, without pages to grow into."""
    contexts = np.array([row.context_len for row in rows], dtype=np.int64)
    num_pages = -(-contexts // block_size)
    tables = (row.block_table[:count] for row, count in zip(rows, num_pages.tolist(), strict=True))
    indices = np.fromiter(chain.from_iterable(tables), dtype=np.int32, count=int(num_pages.sum()))
    last = (contexts - (num_pages - 1) * block_size).astype(np.int32)
    return _indptr(num_pages), torch.from_numpy(indices).to(device), torch.from_numpy(last)


def _indptr(counts: NDArray[Any]) -> Tensor:
    """Where each row begins, and the end of the last."""
    return torch.from_numpy(np.concatenate(([0], counts.cumsum())).astype(np.int32))


def _shape_arguments(kv: Tensor, num_heads: int) -> tuple[int, int, int, int]:
    """(query heads, KV heads, head size, page size), as `plan` takes them."""
    _, _, _, num_kv_heads, block_size, head_dim = kv.shape
    return num_heads, num_kv_heads, head_dim, block_size


def _options(kv: Tensor) -> dict[str, Any]:
    return {"sm_scale": float(kv.shape[5] ** -0.5), "q_data_type": kv.dtype, "kv_data_type": kv.dtype}


def _layers_of(kv: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, `[num_blocks, num_kv_heads, block_size, head_dim]`, views with equal strides."""
    return [(kv[:, layer, 0], kv[:, layer, 1]) for layer in range(kv.shape[1])]


def _wants_tensor_cores(kv: Tensor, num_heads: int) -> bool:
    return num_heads // kv.shape[3] not in PLAIN_GROUPS
