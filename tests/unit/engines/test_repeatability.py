"""What an engine says of its tokens: exact, or best effort."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engines.ext.library import load_kernels
from engines.factory import build_engine_model
from engines.linear import amx
from engines.repeatability import repeatability_of
from tests.checkpoints import make_checkpoint

TINY_CHAT = Path(__file__).resolve().parents[3] / "models" / "tiny-chat"


@pytest.mark.parametrize(
    ("dtype", "linear", "kernels", "word"),
    [
        (torch.float32, "torch", "torch", "exact"),
        (torch.bfloat16, "native", "native", "exact"),
        (torch.bfloat16, "onednn", "native", "best-effort"),
        (torch.bfloat16, "onednn", "torch", "best-effort"),
        (torch.bfloat16, "torch", "native", "best-effort"),
    ],
)
def test_bfloat16_is_exact_only_with_linears_and_attention_of_one_order(
    dtype: torch.dtype, linear: str, kernels: str, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(amx.VARIABLE, "off")
    model, _ = build_engine_model(TINY_CHAT, dtype=dtype, linear=linear, kernels=kernels)
    assert repeatability_of(model) == word


def test_tiles_are_exact_in_an_order_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(amx.VARIABLE, "emulate")
    words = {}
    for dtype in (torch.bfloat16, torch.float32):
        model, _ = build_engine_model(TINY_CHAT, dtype=dtype, linear="native", kernels="native")
        words[dtype] = repeatability_of(model)

    if load_kernels(torch.bfloat16).has_emulated_tiles():
        assert words == {torch.bfloat16: "exact-on-tiles", torch.float32: "exact"}


def test_deterministic_onednn_is_exact() -> None:
    model, _ = build_engine_model(TINY_CHAT, dtype=torch.bfloat16, linear="onednn", deterministic=True)
    assert repeatability_of(model) == "exact"


def test_ranks_compressed_kv_and_models_of_transformers_are_best_effort_in_bfloat16(tmp_path: Path) -> None:
    model, _ = build_engine_model(TINY_CHAT, dtype=torch.bfloat16, linear="native", kernels="native")
    generic, _ = build_engine_model(
        make_checkpoint(tmp_path, "gpt2", num_hidden_layers=2, max_position_embeddings=64), dtype=torch.bfloat16
    )

    assert repeatability_of(model, num_ranks=2) == "best-effort"
    assert repeatability_of(model, compression="int8") == "best-effort"
    assert repeatability_of(generic) == "best-effort"
