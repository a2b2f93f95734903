"""Decode graphs for a model, where it can have them."""

from __future__ import annotations

import logging

from torch import Tensor

from engines.attention.backend import AttentionBackend
from engines.attention.flashinfer_backend import FlashInferAttention
from engines.attention.padded_decode import GraphAttention, PaddedDecodeAttention
from engines.graphs.capture import CudaGraphs, GraphMaker
from engines.graphs.decode_graphs import DecodeGraphs
from engines.graphs.decode_inputs import DecodeInputs
from engines.models.generic import GenericModel
from engines.models.llama import LlamaModel

logger = logging.getLogger(__name__)


def choose_graphs(asked: str, device: str) -> GraphMaker | None:
    """For the setting `engine.cuda_graphs` (auto, off). `auto`: on GPUs, never on a CPU."""
    return CudaGraphs() if asked == "auto" and device == "cuda" else None


def make_decode_graphs(
    model: LlamaModel | GenericModel, kv: Tensor, attention: AttentionBackend, maker: GraphMaker, scratch_block: int
) -> DecodeGraphs | None:
    """None for models with windows and those that transformers runs: their steps decide on the host what to read.

    Args:
        kv: the whole region.
        attention: what the model's eager steps use; its graphs use the same kernels where these can be recorded.
        scratch_block: of the region, and of nobody.
    """
    if isinstance(model, GenericModel) or any(model.config.windows):
        logger.info("decode graphs are off: this model decides on the host what each step reads")
        return None
    own = kv[:, :, :, model.kv_heads]

    def make_attention(inputs: DecodeInputs) -> GraphAttention:
        if isinstance(attention, FlashInferAttention):
            return attention.for_graph(inputs)
        return PaddedDecodeAttention(own, inputs)

    return DecodeGraphs(
        own, scratch_block=scratch_block, forward=model.forward, make_attention=make_attention, maker=maker
    )
