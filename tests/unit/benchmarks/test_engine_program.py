"""Programs that run jobs: answers in order, and failures that name the program and its last words."""

from __future__ import annotations

import sys

import pytest

from benchmarks.engine_profile import overhead_ms
from benchmarks.engine_program import Program
from benchmarks.engine_vllm import chosen_requirements
from benchmarks.errors import ProgramFailed
from benchmarks.stats import Ratio

ECHO = """
import sys
print('{"ready": 1}', flush=True)
for line in sys.stdin:
    print(line.strip(), flush=True)
"""
FAILING = """
import sys
print('{"ready": 1}', flush=True)
sys.stdin.readline()
sys.exit("out of memory")
"""


def program(code: str) -> Program:
    return Program("echo", [sys.executable, "-c", code], env={})


def test_jobs_are_answered_one_by_one() -> None:
    with program(ECHO) as echo:
        assert echo.facts == {"ready": 1}
        assert echo.run({"k": 1}) == {"k": 1}
        assert echo.run({"k": 2}) == {"k": 2}


def test_a_program_that_ends_is_named_with_its_last_words() -> None:
    with program(FAILING) as failing, pytest.raises(ProgramFailed, match="echo: it ended") as caught:
        failing.run({"k": 1})

    assert "out of memory" in caught.value.output


def test_a_program_that_never_starts_is_named_too() -> None:
    with pytest.raises(ProgramFailed, match="no such model"), program("import sys; sys.exit('no such model')"):
        pass


def test_vllm_is_installed_without_extras_pictures_and_sound() -> None:
    text = (
        "regex\ntorch==2.13.0+cpu; platform_machine == 'x86_64'\ntorchvision; x\nscipy; extra == 'bench'\nnumba==0.65.0"
    )

    assert chosen_requirements(text) == ["regex", "numba==0.65.0"]


def test_overhead_is_all_but_the_forward_pass() -> None:
    assert overhead_ms({"parts_ms": {"schedule": 0.1, "forward": 20.0, "logits": 1.0, "sample": 0.2}}) == pytest.approx(
        0.3
    )


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.0, 1.05, "reached"), (1.06, 1.2, "missed"), (1.0, 1.1, "not resolvable here")]
)
def test_a_goal_may_be_an_upper_limit(low: float, high: float, verdict: str) -> None:
    assert Ratio((low + high) / 2, low, high, goal=1.05, at_most=True).verdict == verdict


def test_an_idle_program_is_stopped_and_goes_on_with_its_next_job() -> None:
    with Program("echo", [sys.executable, "-c", ECHO], env={}, is_stopped_when_idle=True) as echo:
        assert echo.run({"k": 1}) == {"k": 1}
        assert echo.run({"k": 2}) == {"k": 2}


def test_two_rounds_are_no_claim() -> None:
    assert Ratio(1.5, 1.4, 1.6, goal=1.2, num_rounds=2).verdict == "too few rounds"
