"""Which attention a GPU runs: FlashInfer where it is there and right, else torch's. One log line says which and why."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from engines.attention.backend import AttentionBackend, AttentionMetadata, AttentionRow
from engines.attention.flashinfer_backend import DTYPES, HEAD_DIMS, FlashInferAttention
from engines.attention.torch_backend import TorchAttention
from engines.self_check import TOLERANCES, relative_error

logger = logging.getLogger(__name__)


def choose_gpu_attention(kv: Tensor, num_heads: int, flashinfer: Any | None) -> AttentionBackend:
    """An attention over the region `kv`, or some of its heads.

    Args:
        flashinfer: the package, None where there is none.
    """
    why_not = _why_not_flashinfer(kv, num_heads, flashinfer)
    if why_not:
        logger.info("attention: torch's scaled_dot_product_attention (%s)", why_not)
        return TorchAttention(kv)
    logger.info("attention: FlashInfer")
    return FlashInferAttention(kv, num_heads, flashinfer)


def _why_not_flashinfer(kv: Tensor, num_heads: int, flashinfer: Any | None) -> str:
    if flashinfer is None:
        return "the package flashinfer is not installed"
    head_dim = kv.shape[5]
    if kv.dtype not in DTYPES or head_dim not in HEAD_DIMS:
        return f"FlashInfer has no kernels for {str(kv.dtype).removeprefix('torch.')} with head_dim {head_dim}"
    try:
        error = attention_error(kv, num_heads, flashinfer)
    except Exception as why:  # its kernels are compiled at first use: anything may be missing on this machine
        return f"FlashInfer failed in the check at the start: {type(why).__name__}: {str(why)[:300]}"
    allowed = TOLERANCES[kv.dtype]
    return (
        "" if error < allowed else f"FlashInfer differs from torch by {error:.3g} of the norm, allowed is {allowed:g}"
    )


def attention_error(kv: Tensor, num_heads: int, flashinfer: Any) -> float:
    """How far FlashInfer is from torch on this device, in heads, sizes and dtype of `kv`: `relative_error`, the worst.

    A step of decode rows and a step of chunks and decode rows, over blocks in no order; what no token fills is NaN.
    """
    _, _, _, num_kv_heads, block_size, head_dim = kv.shape
    rows = (
        AttentionRow(2 * block_size + block_size // 2, 1, [11, 3, 7]),
        AttentionRow(0, 1, [5]),
        AttentionRow(block_size - 1, 1, [2, 9]),
    )
    chunks = (AttentionRow(block_size, block_size + 1, [4, 8, 0]), rows[0], AttentionRow(0, 2, [6, 10]))
    generator = torch.Generator(device=kv.device).manual_seed(0)
    region = torch.full((12, 1, 2, num_kv_heads, block_size, head_dim), float("nan"), dtype=kv.dtype, device=kv.device)
    worst = 0.0
    for step in (rows, chunks):
        for row in step:
            for position in range(row.start):
                block, offset = row.block_table[position // block_size], position % block_size
                region[block, 0, :, :, offset] = torch.randn(
                    2, num_kv_heads, head_dim, dtype=kv.dtype, device=kv.device, generator=generator
                )
        slots = [
            row.block_table[p // block_size] * block_size + p % block_size
            for row in step
            for p in range(row.start, row.context_len)
        ]
        metadata = AttentionMetadata(step, torch.tensor(slots, device=kv.device))
        q, k, v = (
            torch.randn(len(slots), heads, head_dim, dtype=kv.dtype, device=kv.device, generator=generator)
            for heads in (num_heads, num_kv_heads, num_kv_heads)
        )
        plain, fast = TorchAttention(region), FlashInferAttention(region, num_heads, flashinfer)
        outs = []
        for attention in (plain, fast):
            attention.begin_step(metadata)
            attention.write_kv(0, k, v)
            outs.append(attention.forward(0, q))
        worst = max(worst, relative_error(outs[1], outs[0]))
    return worst
