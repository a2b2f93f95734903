"""A model that transformers runs, handed over between workers and served by HTTP: the tokens of `generate`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint, reference_model
from tests.cluster import read_streams, running_cluster

NUM_TOKENS = 24
pytestmark = pytest.mark.gate


def _generate(model: Any, prompt_ids: list[int]) -> list[int]:
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=NUM_TOKENS,
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
    )
    new: list[int] = output[0, len(prompt_ids) :].tolist()
    return new


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("gpt2", {}),
        ("gemma2", {"head_dim": 24, "sliding_window": 40}),
        ("phi", {"partial_rotary_factor": 0.5}),
        ("mistral", {"sliding_window": 40}),  # one of our own, with windows
    ],
)
def test_tokens_equal_generate_over_a_hand_off(family: str, shape: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family, num_hidden_layers=2, max_position_embeddings=512, **shape)
    prompts = [[(7 * i * k + 3) % 250 + 3 for i in range(n)] for k, n in enumerate((1, 5, 31, 32, 33, 70, 150))]
    expected = [_generate(reference_model(folder), prompt) for prompt in prompts]

    flags = ("--model", str(folder), "--dtype", "float32", "--prefill", "1", "--decode", "1")
    with running_cluster(tmp_path / "run", *flags) as cluster:
        bodies = [{"prompt": p, "max_tokens": NUM_TOKENS, "min_tokens": NUM_TOKENS, "temperature": 0} for p in prompts]
        streams = asyncio.run(read_streams(cluster.url, bodies))

    assert [stream.token_ids[0] for stream in streams] == expected
