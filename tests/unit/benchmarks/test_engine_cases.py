"""What a case measures, and what a shape must read and compute."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine_cases import CASES, Case, Roof
from benchmarks.engine_shapes import SHAPES, Shape, write_checkpoint
from engines.factory import build_engine_model
from engines.models.config import ModelConfig

SMALL = Shape("small", hidden=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate=48, vocab=300)


class Machine:
    """A program whose prefill takes 1 ms and each further step 10 ms."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []

    def run(self, job: dict[str, Any]) -> dict[str, float]:
        self.jobs.append(job)
        return {"seconds": 0.001 + 0.01 * (job["output_len"] - 1)}


def test_decode_is_what_further_tokens_cost() -> None:
    machine = Machine()

    speed = Case("decode_b8", "decode", 8, 64, 1.2).measure(machine.run, decode_tokens=32, seed=5)

    assert math.isclose(speed, 8 / 0.01)
    assert [job["output_len"] for job in machine.jobs] == [1, 33]
    assert len({job["seed"] for job in machine.jobs}) == 2, "equal prompts would be found in a prefix cache"


def test_prefill_is_one_job_with_one_output_token() -> None:
    machine = Machine()

    speed = Case("prefill_4x512", "prefill", 4, 512, 1.0).measure(machine.run, decode_tokens=32, seed=5)

    assert math.isclose(speed, 4 * 512 / 0.001)
    assert len(machine.jobs) == 1


def test_a_longer_job_that_was_faster_gives_no_number() -> None:
    times = iter([0.5, 0.4])

    speed = CASES[0].measure(lambda _: {"seconds": next(times)}, decode_tokens=32, seed=0)

    assert math.isnan(speed)


def test_one_sequence_is_bound_by_memory_and_a_long_prompt_by_arithmetic() -> None:
    shape, cases = SHAPES["135m"], {case.name: case for case in CASES}
    slow_memory, slow_arithmetic = Roof(1e9, 1e15), Roof(1e15, 1e9)

    decode, prefill = (
        cases[name].work(shape, decode_tokens=32, dtype="bfloat16").tokens_per_s(roof)
        for name, roof in (("decode_b1", slow_memory), ("prefill_1x2048", slow_arithmetic))
    )

    assert 1e9 / decode == pytest.approx(2 * 134.5e6, rel=0.02), "two bytes for each of 135M weights, and some KV"
    assert 1e9 / prefill == pytest.approx(2 * 106.2e6 + 4 * 576 * 30 * 1024.5, rel=0.02), "no head but for the last"


@pytest.mark.parametrize(("name", "num_params"), [("tiny-chat", 4.88e6), ("135m", 134.5e6), ("05b", 494e6)])
def test_shapes_have_the_size_of_their_name(name: str, num_params: float) -> None:
    shape = SHAPES[name]

    assert shape.num_layers * shape.layer_params + shape.hidden * shape.vocab == pytest.approx(num_params, rel=0.01)


def test_a_written_checkpoint_is_a_model(tmp_path: Path) -> None:
    write_checkpoint(SMALL, tmp_path, seed=3)

    model, config = build_engine_model(tmp_path, dtype=torch.bfloat16)

    assert (config.num_layers, config.head_dim, config.vocab_size) == (2, 8, 300)
    assert ModelConfig.from_folder(tmp_path).tie_word_embeddings
    assert model.dtype == torch.bfloat16


def test_the_same_seed_writes_the_same_weights(tmp_path: Path) -> None:
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_checkpoint(SMALL, tmp_path / folder, seed=seed)

    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_its_tokenizer_has_a_token_for_every_byte(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_checkpoint(SMALL, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Zäh, 中文 \n"

    ids = tokenizer.encode(text).ids

    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert max(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"].values()) == 258
