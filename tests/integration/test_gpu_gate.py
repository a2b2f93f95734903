"""The exactness gate on a GPU, where there is one: model, attention, KV and sampling on the device, in one process,
decode steps one by one and as graphs. Whole workers on a GPU: layout `cuda` of test_gate.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch

from engines.factory import keep_products_exact
from engines.graphs.make import choose_graphs
from tests.checkpoints import FAMILIES, make_checkpoint, reference_model
from tests.devices import needs_gpu
from tests.pairwise import pairwise_cases
from tests.unit.engines.gate_engine import NUM_OUTPUT, gate_model, run_case
from tests.unit.engines.test_gate_axes import gate_prompts

pytestmark = [pytest.mark.gate, needs_gpu]
AXES: Final = {
    "model": FAMILIES,
    "chunk": ("7", "33", "2048"),
    "max_seqs": ("1", "16"),
    "cache": ("off", "cold", "warm"),
    "role": ("both", "handed"),
    "threads": ("1",),
    "graphs": ("auto", "off"),
}
CASES: Final = pairwise_cases(AXES)
MAX_LOGIT_ERROR: Final = 2e-3
MAX_BF16_ERROR: Final = 0.03  # of the norm of the logits


def _id(case: dict[str, str]) -> str:
    return "-".join(case.values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    keep_products_exact("cuda")
    return {family: make_checkpoint(tmp_path_factory.mktemp("gpu"), family, seed=3) for family in FAMILIES}


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_fp32_tokens_and_logits_equal_those_of_transformers(case: dict[str, str], folders: dict[str, Path]) -> None:
    folder = folders[case["model"]]
    model = gate_model(folder, "torch", "torch", torch.float32, device="cuda")
    reference = reference_model(folder).cuda()

    outputs = run_case(model, gate_prompts(), case, device="cuda", graphs=choose_graphs(case["graphs"], "cuda"))

    for prompt, output in zip(gate_prompts(), outputs, strict=True):
        expected = _logits_of(reference, prompt, output.token_ids)
        assert output.token_ids == expected.argmax(-1).tolist()
        assert (output.logits - expected).abs().max() < MAX_LOGIT_ERROR


@pytest.mark.parametrize("case", CASES, ids=_id)
def test_bfloat16_logits_are_near_those_of_transformers(case: dict[str, str], folders: dict[str, Path]) -> None:
    folder = folders[case["model"]]
    model = gate_model(folder, "torch", "torch", torch.bfloat16, device="cuda")
    reference = reference_model(folder, torch.bfloat16).cuda()

    outputs = run_case(model, gate_prompts(), case, device="cuda", graphs=choose_graphs(case["graphs"], "cuda"))

    for prompt, output in zip(gate_prompts(), outputs, strict=True):
        expected = _logits_of(reference, prompt, output.token_ids)
        assert (output.logits - expected).norm() / expected.norm() < MAX_BF16_ERROR


def _logits_of(reference: torch.nn.Module, prompt: list[int], token_ids: list[int]) -> torch.Tensor:
    """`[NUM_OUTPUT, vocab]` fp32, on the CPU: by which transformers chooses each token behind those before it."""
    with torch.no_grad():
        logits: torch.Tensor = reference(torch.tensor([[*prompt, *token_ids[:-1]]], device="cuda")).logits
    return logits[0, -NUM_OUTPUT:].float().cpu()
