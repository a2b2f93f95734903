"""All layers in one C++ call against the same layers part by part: every bit of logits and KV is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.attention.native_backend import NativeAttention
from engines.factory import build_engine_model
from engines.linear.native_linear import INT8, Quantization
from engines.models.llama import LlamaModel
from tests.checkpoints import FAMILIES, make_checkpoint

BLOCK_SIZE, NUM_BLOCKS = 16, 64
INT4 = Quantization(bits=4, group=32)


def run(model: LlamaModel, reported: list[tuple[int, int]], *, group: int) -> tuple[Tensor, Tensor]:
    """Logits and KV of a prompt, then of a step that decodes it, adds a chunk of another and one more row."""
    config = model.config
    assert model.kernels is not None
    shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    kv = torch.zeros(shape, dtype=model.dtype)
    attention = NativeAttention(kv, config.num_heads, model.kernels)
    logits = []
    for spans in ([(0, 0, 70)], [(0, 70, 71), (8, 0, 33), (16, 0, 1)]):
        rows = tuple(AttentionRow(lo, hi - lo, list(range(first, first + 8))) for first, lo, hi in spans)
        slots = torch.tensor([first * BLOCK_SIZE + p for first, lo, hi in spans for p in range(lo, hi)])
        attention.begin_step(AttentionMetadata(rows, slots))
        positions = torch.tensor([p for _, lo, hi in spans for p in range(lo, hi)])
        ids = (positions * 7 + 3) % config.vocab_size
        hidden = model.forward(
            ids, positions, attention, on_layers=lambda lo, hi: reported.append((lo, hi)), layer_group=group
        )
        logits.append(model.logits(hidden))
    return torch.cat(logits), kv


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_threads", "quantization"), [(1, None), (2, None), (1, INT8), (2, INT4)])
def test_one_call_equals_the_parts(
    tmp_path: Path, family: str, dtype: torch.dtype, num_threads: int, quantization: Quantization | None
) -> None:
    # Hidden rows of 1 KiB in float32: there the room between rows is padded.
    folder = make_checkpoint(tmp_path, family, hidden_size=256, intermediate_size=160)
    torch.set_num_threads(num_threads)
    reports: list[tuple[int, int]] = []
    reports_of_parts: list[tuple[int, int]] = []
    try:
        with torch.inference_mode():
            model, _ = build_engine_model(
                folder, dtype=dtype, linear="native", kernels="native", quantization=quantization
            )
            assert isinstance(model, LlamaModel)
            assert model.stack is not None
            logits, kv = run(model, reports, group=2)
            model.stack = None
            logits_of_parts, kv_of_parts = run(model, reports_of_parts, group=2)
    finally:
        torch.set_num_threads(1)

    assert logits.isfinite().all()
    assert torch.equal(logits, logits_of_parts)
    assert torch.equal(kv, kv_of_parts)
    assert reports == reports_of_parts == [(0, 2), (2, 3)] * 2


def test_layers_with_other_linears_are_called_part_by_part(tmp_path: Path) -> None:
    model, _ = build_engine_model(make_checkpoint(tmp_path, "llama"), dtype=torch.float32, linear="onednn")
    assert isinstance(model, LlamaModel)
    assert model.stack is None
