"""Which attention a model runs on."""

from __future__ import annotations

import logging

from torch import Tensor

from engines.attention.backend import AttentionBackend
from engines.attention.native_backend import NativeAttention
from engines.attention.torch_backend import TorchAttention
from engines.ext.library import HEAD_DIMS, Kernels

logger = logging.getLogger(__name__)


def choose_attention(kv: Tensor, num_heads: int, kernels: Kernels | None) -> AttentionBackend:
    """The C++ one where there are kernels for this head dimension, else torch's."""
    head_dim = kv.shape[-1]
    if kernels is None:
        return TorchAttention(kv)
    if head_dim not in HEAD_DIMS:
        logger.warning("No attention kernel for head_dim %d; torch's is used, slower.", head_dim)
        return TorchAttention(kv)
    return NativeAttention(kv, num_heads, kernels)
