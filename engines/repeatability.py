"""Whether an engine gives a request the same tokens whatever else it computes, in chunks of any size, after a recovery.

In float32 that is the contract of every part. In bfloat16 a sum that is added up in another order gives another token
now and then, so it holds only where each order is the sequence's own, and between workers only where they share it: AMX
tiles add up in another order than AVX-512.
"""

from __future__ import annotations

import torch

from engines.ext.library import HEAD_DIMS
from engines.messages import Repeatability
from engines.models.generic import GenericModel
from engines.models.llama import LlamaModel


def repeatability_of(
    model: LlamaModel | GenericModel, *, num_ranks: int = 1, compression: str = "none"
) -> Repeatability:
    """What the engine of `model` says of itself.

    Args:
        num_ranks: that share the model; their sums are added up in an order of their own.
        compression: `transfer.compression`. Something is lost of the KV of a prompt, after a recovery of all tokens.
    """
    if compression != "none":
        return "best-effort"
    if model.dtype == torch.float32:
        return "exact"
    if isinstance(model, GenericModel) or num_ranks > 1 or not model.is_batch_invariant:
        return "best-effort"
    has_own_attention = model.kernels is not None and model.config.head_dim in HEAD_DIMS
    if not has_own_attention or any(model.config.windows):
        return "best-effort"
    return "exact-on-tiles" if model.is_on_tiles else "exact"
