"""The bundled model: every prompt of the gate, token for token, through scheduler and runner in fp32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engines.params import SamplingParams
from tests.unit.engines.engine_loop import Loop, make_sequence

FOLDER = Path(__file__).resolve().parents[3] / "models" / "tiny-chat"


@pytest.mark.parametrize("max_num_batched_tokens", [96, 2048])
def test_all_gate_prompts_are_token_exact(max_num_batched_tokens: int) -> None:
    torch.set_num_threads(1)
    prompts = [json.loads(line) for line in (FOLDER / "prompts.jsonl").read_text().splitlines()]
    loop = Loop.load(FOLDER, num_blocks=1024, block_size=32)
    sequences = [
        make_sequence(
            f"r{i}", row["prompt_ids"], SamplingParams(temperature=0.0, max_tokens=len(row["completion_ids"]))
        )
        for i, row in enumerate(prompts)
    ]

    outputs = loop.generate(sequences, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=24)

    wrong = [i for i, row in enumerate(prompts) if outputs[i] != row["completion_ids"]]
    assert (len(prompts), wrong) == (64, [])
