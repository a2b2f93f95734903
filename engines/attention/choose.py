"""Which attention a model runs on."""

from __future__ import annotations

import logging

from torch import Tensor

from engines.attention.backend import AttentionBackend
from engines.attention.choose_gpu import choose_gpu_attention
from engines.attention.flashinfer_backend import find_flashinfer
from engines.attention.native_backend import NativeAttention
from engines.attention.torch_backend import TorchAttention
from engines.errors import KernelsUnavailable
from engines.ext.library import HEAD_DIMS, Kernels

logger = logging.getLogger(__name__)


def choose_attention(
    kv: Tensor, num_heads: int, kernels: Kernels | None, *, deterministic: bool = False
) -> AttentionBackend:
    """On a GPU what `choose_gpu_attention` finds; on a CPU the C++ one where there are kernels, else torch's.

    Raises:
        KernelsUnavailable: `deterministic` needs the C++ one, and there is none.
    """
    head_dim = kv.shape[-1]
    if deterministic and (kernels is None or head_dim not in HEAD_DIMS):
        raise KernelsUnavailable(
            why=f"`engine.deterministic` needs them, with head_dim {head_dim}",
            hint=f"Expected `engine.kernels: auto` with a compiler, and head_dim {sorted(HEAD_DIMS)}.",
        )
    if kv.device.type == "cuda":
        return choose_gpu_attention(kv, num_heads, find_flashinfer())
    if kernels is None:
        return TorchAttention(kv)
    if head_dim not in HEAD_DIMS:
        logger.warning("No attention kernel for head_dim %d; torch's is used, slower.", head_dim)
        return TorchAttention(kv)
    return NativeAttention(kv, num_heads, kernels)
