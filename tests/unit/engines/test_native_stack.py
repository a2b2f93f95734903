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
    """Logits and KV of a prompt, then of a step that decodes it, adds a chunk of another and one row; two decode."""
    config = model.config
    assert model.kernels is not None
    shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    kv = torch.zeros(shape, dtype=model.dtype)
    attention = NativeAttention(kv, config.num_heads, model.kernels)
    logits = []
    steps = [[(0, 0, 70)], [(0, 70, 71), (8, 0, 33), (16, 0, 1)], [(0, 71, 72)], [(0, 72, 73), (8, 33, 34)]]
    for spans in steps:
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
    assert reports == reports_of_parts == [(0, 2), (2, 3)] * 4


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_row_with_several_splits_decodes_as_the_parts_do(tmp_path: Path, num_threads: int) -> None:
    folder = make_checkpoint(tmp_path, "llama", max_position_embeddings=1024)
    model, _ = build_engine_model(folder, dtype=torch.bfloat16, linear="native", kernels="native")
    assert isinstance(model, LlamaModel)
    assert model.kernels is not None
    config, found = model.config, []
    stack = model.stack
    assert stack is not None
    torch.set_num_threads(num_threads)
    try:
        for model.stack in (stack, None):
            shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
            kv = torch.zeros(shape, dtype=model.dtype)
            attention = NativeAttention(kv, config.num_heads, model.kernels)
            for lo, hi in ((0, 700), (700, 701), (701, 702)):
                positions = torch.arange(lo, hi)
                row = AttentionRow(lo, hi - lo, list(range(NUM_BLOCKS)))
                attention.begin_step(AttentionMetadata((row,), positions))
                hidden = model.forward(positions % config.vocab_size, positions, attention)
            found.append((hidden, kv))
    finally:
        torch.set_num_threads(1)

    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(("token_id", "position"), [(-1, 0), (10**6, 0), (1, -1), (1, 10**6)])
def test_ids_and_positions_beyond_the_tables_are_refused_before_anything_is_written(
    tmp_path: Path, token_id: int, position: int
) -> None:
    model, _ = build_engine_model(make_checkpoint(tmp_path, "llama"), dtype=torch.float32, linear="native")
    assert isinstance(model, LlamaModel)
    assert model.kernels is not None
    config = model.config
    kv = torch.zeros((2, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim))
    attention = NativeAttention(kv, config.num_heads, model.kernels)
    attention.begin_step(AttentionMetadata((AttentionRow(0, 2, [0]),), torch.arange(2)))

    with pytest.raises(IndexError, match="Expected ids below"):
        model.forward(torch.tensor([1, token_id]), torch.tensor([0, position]), attention)

    assert not kv.any()


def test_layers_with_other_linears_are_called_part_by_part(tmp_path: Path) -> None:
    model, _ = build_engine_model(make_checkpoint(tmp_path, "llama"), dtype=torch.float32, linear="onednn")
    assert isinstance(model, LlamaModel)
    assert model.stack is None
