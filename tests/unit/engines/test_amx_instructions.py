"""The AMX instructions as they are assembled, on CPUs that have none: trapped, and done as documented."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engines.ext.library import load_kernels
from engines.linear.amx import READY
from tests.checkpoints import make_checkpoint

ROOT = Path(__file__).resolve().parents[3]


def test_the_instructions_give_the_bits_of_the_emulation(tmp_path: Path) -> None:
    kernels = load_kernels(torch.bfloat16)
    if not kernels.has_emulated_tiles():
        pytest.skip("no tiles: neither x86-64 nor FMA")
    if kernels.find_amx() == READY:
        pytest.skip("this CPU has AMX, and test_amx_linear.py runs on it")
    folder = make_checkpoint(tmp_path, "llama", hidden_size=256, intermediate_size=160)

    made = subprocess.run(
        [sys.executable, "-m", "tests.amx.trapped", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    assert made.returncode == 0, made.stderr[-2000:]
    found = json.loads(made.stdout.splitlines()[-1])
    assert found.pop("instructions") > 1000
    assert found == dict.fromkeys(found, True), found
