"""Models of our own with sliding windows: the tokens of `generate`, short of the window and beyond it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engines.factory import build_engine_model
from engines.models.llama import LlamaModel
from tests.checkpoints import make_checkpoint, reference_model
from tests.unit.engines.conftest import Reference
from tests.unit.engines.engine_loop import Loop, make_sequence, random_prompts

WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2},
}


@pytest.fixture(scope="module", params=WINDOWED)
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    family: str = request.param
    folder = make_checkpoint(tmp_path_factory.mktemp(family), family, **WINDOWED[family])
    model = reference_model(folder)
    model.generation_config.eos_token_id = None
    return Reference(folder, model)


@pytest.mark.parametrize("max_num_batched_tokens", [5, 33, 2048])
def test_tokens_equal_generate_with_short_and_long_rows_in_a_step(
    windowed: Reference, max_num_batched_tokens: int
) -> None:
    prompts = [*random_prompts(4, seed=6, longest=60), [5, 6], list(range(3, 150))]
    loop = Loop.load(windowed.folder)

    outputs = loop.generate(
        [make_sequence(f"r{i}", prompt) for i, prompt in enumerate(prompts)],
        max_num_batched_tokens=max_num_batched_tokens,
    )

    assert outputs == [windowed.generate(prompt, 20) for prompt in prompts]


def test_prefix_hits_change_no_token(windowed: Reference) -> None:
    prompt = list(range(3, 90))
    loop = Loop.load(windowed.folder)

    first = loop.generate([make_sequence("a", prompt)])
    again = make_sequence("b", prompt)
    second = loop.generate([again])

    assert first == second == [windowed.generate(prompt, 20)]
    assert again.num_cached_tokens > 24


def test_windows_run_on_the_model_of_our_own(windowed: Reference) -> None:
    model, _ = build_engine_model(windowed.folder, dtype=torch.float32)

    assert isinstance(model, LlamaModel)
    assert any(model.config.windows)
