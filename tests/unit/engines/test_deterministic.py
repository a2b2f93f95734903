"""`engine.deterministic`: a token's hidden state depends on its sequence alone, bit for bit, also in bfloat16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.attention.choose import choose_attention
from engines.errors import DeviceUnavailable, KernelsUnavailable
from engines.factory import build_engine_model
from engines.linear.choose import choose_linear
from engines.models.llama import LlamaModel
from tests.unit.engines.engine_loop import random_prompts

TINY_CHAT = Path(__file__).resolve().parents[3] / "models" / "tiny-chat"
BLOCK_SIZE, NUM_BLOCKS = 32, 32


class Steps:
    """Sequences that are computed in spans of any length, several of them in one step."""

    def __init__(self, dtype: torch.dtype) -> None:
        model, config = build_engine_model(TINY_CHAT, dtype=dtype, deterministic=True)
        assert isinstance(model, LlamaModel)
        self._model = model
        shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        kv = torch.full(shape, float("nan"), dtype=dtype)
        self._attention = choose_attention(kv, config.num_heads, model.kernels, deterministic=True)

    def run(self, *spans: tuple[list[int], int, int, int]) -> list[Tensor]:
        """Logits of the tokens [lo, hi) of each (ids, first block, lo, hi)."""
        slots = [first * BLOCK_SIZE + p for _, first, lo, hi in spans for p in range(lo, hi)]
        rows = (AttentionRow(lo, hi - lo, list(range(first, NUM_BLOCKS))) for _, first, lo, hi in spans)
        self._attention.begin_step(AttentionMetadata(tuple(rows), torch.tensor(slots)))
        ids = torch.tensor([token for prompt, _, lo, hi in spans for token in prompt[lo:hi]])
        positions = torch.tensor([p for _, _, lo, hi in spans for p in range(lo, hi)])
        logits = self._model.logits(self._model.forward(ids, positions, self._attention))
        return list(logits.split([hi - lo for _, _, lo, hi in spans]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_chunks_and_decoding_do_not_change_a_single_bit(dtype: torch.dtype) -> None:
    torch.set_num_threads(1)
    prompt, other = (ids * 3 for ids in random_prompts(2, seed=4, longest=60))
    steps = Steps(dtype)
    with torch.inference_mode():
        (whole,) = steps.run((prompt, 0, 0, len(prompt)))
        (alone,) = zip(*(steps.run((prompt, 8, p, p + 1)) for p in range(len(prompt))), strict=True)
        chunks = [
            steps.run((other, 16, 0, len(other)), (prompt, 24, lo, min(lo + 7, len(prompt))), (other[:1], 20, 0, 1))[1]
            for lo in range(0, len(prompt), 7)
        ]

    assert torch.equal(torch.cat(alone), whole)
    assert torch.equal(torch.cat(chunks), whole)


def test_what_cannot_be_deterministic_is_refused_by_name() -> None:
    with pytest.raises(DeviceUnavailable, match=r"engine\.deterministic"):
        choose_linear("torch", dtype=torch.float32, device="cpu", deterministic=True)
    with pytest.raises(KernelsUnavailable, match=r"engine\.deterministic"):
        choose_attention(torch.zeros(1, 1, 2, 1, 4, 64), 1, None, deterministic=True)
