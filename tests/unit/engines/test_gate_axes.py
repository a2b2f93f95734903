"""The exactness gate in one process: every lean model over every backend, however its work is cut up.

fp32: greedy tokens equal `transformers.generate`, and each token's logits are near those of transformers. bfloat16 with
`engine.deterministic`: all logits are equal, bit for bit, whatever the case.

`make test` runs cases that hold every pair of two axes' values; `make test-gate` (CELERIAC_GATE=all) every combination.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor

from engines.sequence import Sequence
from tests.checkpoints import FAMILIES, make_checkpoint, reference_model
from tests.pairwise import all_cases, pairs_of, pairwise_cases
from tests.unit.engines import gate_engine
from tests.unit.engines.gate_engine import NUM_OUTPUT, gate_model, move_blocks, recover, run_case

TINY_CHAT = Path(__file__).resolve().parents[3] / "models" / "tiny-chat"
MODELS: Final = (*FAMILIES, "tiny-chat")
CUTS: Final = {
    "chunk": ("7", "33", "2048"),
    "max_seqs": ("1", "16"),
    "cache": ("off", "cold", "warm"),
    "role": ("both", "handed"),
    "threads": ("1", "2"),
}
FP32_AXES: Final = {
    "model": MODELS,
    "linear": ("torch", "onednn", "native"),
    "attention": ("torch", "native"),
    **CUTS,
}
BF16_AXES: Final = {"model": MODELS, "linear": ("onednn", "native", "tiles"), **CUTS}
PLAIN: Final = {"chunk": "2048", "max_seqs": "1", "cache": "off", "role": "both", "threads": "1"}
MAX_LOGIT_ERROR: Final = 1e-3
NEEDLES: Final = (3, 40, 77, 100, 126)  # where the long prompts differ: first and last chunks, and between
LONG: Final = 130
IS_COMPLETE: Final = os.environ.get("CELERIAC_GATE") == "all"


def _cases(axes: Mapping[str, tuple[str, ...]]) -> list[dict[str, str]]:
    return all_cases(axes) if IS_COMPLETE else pairwise_cases(axes)


def _name(case: Mapping[str, str]) -> str:
    return "-".join(case.values())


@dataclass(frozen=True)
class Expected:
    """What transformers says. `logits`: `[NUM_OUTPUT, vocab]` of each prompt."""

    token_ids: list[list[int]]
    logits: list[Tensor]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("gate")
    return {family: make_checkpoint(tmp, family, seed=3) for family in FAMILIES} | {"tiny-chat": TINY_CHAT}


def gate_prompts() -> list[list[int]]:
    """Some short ones, and long ones that differ in one token each."""
    base = [3 + (7 * i * i + i // 5) % 250 for i in range(LONG)]
    needles = [[*base[:at], 3 + (base[at] + 77) % 250, *base[at + 1 :]] for at in NEEDLES]
    return [[5], base[20:29], base[60:100], base, *needles]


@cache
def expected(folder: Path) -> Expected:
    torch.set_num_threads(1)
    model = reference_model(folder)
    model.generation_config.eos_token_id = None
    token_ids, logits = [], []
    for prompt in gate_prompts():
        ids = torch.tensor([prompt])
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_OUTPUT, do_sample=False)
            logits.append(model(whole[:, :-1]).logits[0, len(prompt) - 1 :])
        token_ids.append(whole[0, len(prompt) :].tolist())
    return Expected(token_ids, logits)


@pytest.mark.parametrize("case", _cases(FP32_AXES), ids=_name)
def test_tokens_and_logits_equal_those_of_transformers(case: dict[str, str], folders: dict[str, Path]) -> None:
    folder = folders[case["model"]]
    model = gate_model(folder, case["linear"], case["attention"], torch.float32, deterministic=False)
    want = expected(folder)

    outputs = run_case(model, gate_prompts(), case)

    assert [output.token_ids for output in outputs] == want.token_ids
    errors = [(out.logits - logits).abs().max().item() for out, logits in zip(outputs, want.logits, strict=True)]
    assert max(errors) < MAX_LOGIT_ERROR, errors


@pytest.mark.parametrize("case", _cases(BF16_AXES), ids=_name)
def test_deterministic_logits_are_equal_bit_for_bit(case: dict[str, str], folders: dict[str, Path]) -> None:
    folder = folders[case["model"]]
    model = gate_model(folder, case["linear"], "native", torch.bfloat16, deterministic=True)
    alone = _plain_outputs(folder, case["linear"], case["threads"])

    outputs = run_case(model, gate_prompts(), case)

    for found, want in zip(outputs, alone, strict=True):
        assert found.token_ids == want[0]
        assert torch.equal(found.logits, want[1])


@pytest.mark.parametrize("linear", BF16_AXES["linear"])
@pytest.mark.parametrize("name", MODELS)
def test_deterministic_recovery_goes_on_bit_for_bit(name: str, linear: str, folders: dict[str, Path]) -> None:
    model = gate_model(folders[name], linear, "native", torch.bfloat16, deterministic=True)
    prompt = gate_prompts()[-1]
    token_ids, logits = _plain_outputs(folders[name], linear, "1")[-1]

    for num_known, chunk in ((1, 2048), (3, 7), (NUM_OUTPUT - 1, 33)):
        output = recover(model, prompt, token_ids[:num_known], chunk)

        assert output.token_ids == token_ids
        assert torch.equal(output.logits, logits[num_known:])


@cache
def _plain_outputs(folder: Path, linear: str, threads: str) -> list[tuple[list[int], Tensor]]:
    """Each prompt by itself, in one chunk."""
    model = gate_model(folder, linear, "native", torch.bfloat16, deterministic=True)
    outputs = run_case(model, gate_prompts(), {**PLAIN, "threads": threads})
    return [(output.token_ids, output.logits) for output in outputs]


@pytest.mark.parametrize("name", MODELS)
def test_a_change_anywhere_in_a_long_prompt_would_be_seen(name: str, folders: dict[str, Path]) -> None:
    logits = expected(folders[name]).logits
    base, needles = logits[-len(NEEDLES) - 1], logits[-len(NEEDLES) :]

    for at, changed in zip(NEEDLES, needles, strict=True):
        assert (changed[0] - base[0]).abs().max() > 10 * MAX_LOGIT_ERROR, f"token {at} of {LONG}"


@pytest.mark.parametrize("name", MODELS)
def test_one_damaged_token_of_one_head_would_be_seen(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gate_model(folders[name], "onednn", "native", torch.float32, deterministic=False)

    def move_and_damage(loop: gate_engine.GateLoop, sequence: Sequence) -> None:
        move_blocks(loop, sequence)
        loop.region.kv[sequence.block_table[0], 1, 1, 0, 0] += 1.0  # values of layer 1, head 0, the first token

    monkeypatch.setattr(gate_engine, "move_blocks", move_and_damage)
    outputs = run_case(model, gate_prompts(), {**PLAIN, "role": "handed"})

    errors = [
        (out.logits - logits).abs().max().item()
        for out, logits in zip(outputs, expected(folders[name]).logits, strict=True)
    ]
    assert min(errors) > MAX_LOGIT_ERROR, errors


@pytest.mark.parametrize("axes", [FP32_AXES, BF16_AXES], ids=["fp32", "bf16"])
def test_the_cases_hold_every_pair_of_values(axes: dict[str, tuple[str, ...]]) -> None:
    cases = pairwise_cases(axes)

    assert {p for case in all_cases(axes) for p in pairs_of(case)} == {p for case in cases for p in pairs_of(case)}
    assert len(cases) < 40
