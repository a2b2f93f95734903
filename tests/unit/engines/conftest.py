"""Small checkpoints of every family, made once, with what transformers says about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import FAMILIES, make_checkpoint, reference_model


@dataclass(frozen=True)
class Reference:
    folder: Path
    model: Any

    def generate(self, prompt_ids: list[int], num_tokens: int) -> list[int]:
        with torch.no_grad():
            ids = self.model.generate(torch.tensor([prompt_ids]), max_new_tokens=num_tokens, do_sample=False)
        return list(map(int, ids[0, len(prompt_ids) :]))


@pytest.fixture(scope="session")
def checkpoints_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session", params=FAMILIES)
def reference(request: pytest.FixtureRequest, checkpoints_folder: Path) -> Reference:
    torch.set_num_threads(1)
    folder = make_checkpoint(checkpoints_folder, request.param)
    # Without end tokens both sides generate as many tokens as they are asked for.
    model = reference_model(folder)
    model.generation_config.eos_token_id = None
    return Reference(folder, model)


@pytest.fixture(scope="session")
def llama_folder(checkpoints_folder: Path) -> Path:
    torch.set_num_threads(1)
    return make_checkpoint(checkpoints_folder, "llama", seed=7)
