"""Programs that run jobs: answers in order, and failures that name the program and its last words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.engine_profile import overhead_ms
from benchmarks.engine_program import ROOT, STOP_TIMEOUT_S, Program
from benchmarks.engine_vllm import chosen_requirements
from benchmarks.errors import ProgramFailed
from benchmarks.stats import Ratio
from kvstore.readable import wait_readable

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


UNTIL_KILLED = "import signal; signal.alarm(600); signal.pause()"  # or ten minutes later, whatever becomes of the test
BUSY = f"""
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", "{UNTIL_KILLED}"])
print('{{"worker": %d}}' % worker.pid, flush=True)
sys.stdin.readline()
print('{{"begun": 1}}', flush=True)
{UNTIL_KILLED}
"""


@pytest.mark.parametrize("is_stopped_when_idle", [False, True])
def test_a_signal_ends_a_program_and_its_children_in_the_middle_of_a_job(is_stopped_when_idle: bool) -> None:
    """Its job would go on for ten minutes, whatever becomes of its standard input."""
    with (
        pytest.raises(KeyboardInterrupt),
        Program("busy", [sys.executable, "-c", BUSY], env={}, is_stopped_when_idle=is_stopped_when_idle) as busy,
    ):
        worker = os.pidfd_open(busy.facts["worker"])
        assert busy.run({"k": 1}) == {"begun": 1}
        told_s = time.monotonic()
        raise KeyboardInterrupt

    assert time.monotonic() - told_s < STOP_TIMEOUT_S, "it was given no time to finish"
    assert wait_readable([worker], STOP_TIMEOUT_S), "its child is dead, too"
    os.close(worker)


BENCH = """
import sys
from benchmarks import engine_determinism
from benchmarks.cli import bench
from benchmarks.engine_program import Program

engine_determinism.solo_program = lambda *_, **__: Program("busy", [sys.executable, "-c", sys.argv[1]], env={})
bench(["engine", "--determinism", "--shape", "tiny-chat"])
"""
TELLING = BUSY.replace("print('{\"begun\": 1}', flush=True)", "open(FIFO, 'w').write(str(worker.pid))")


def test_a_bench_that_timeout_terminates_ends_at_once_with_all_that_it_started(tmp_path: Path) -> None:
    """`timeout` signals the process and then its group: the second SIGTERM comes while the first is obeyed."""
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo)
    command = [sys.executable, "-c", BENCH, TELLING.replace("FIFO", repr(fifo))]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0)
    with started as bench:
        worker = os.pidfd_open(int(Path(fifo).read_text()))  # its job has begun

        bench.send_signal(signal.SIGTERM)
        os.killpg(bench.pid, signal.SIGTERM)

        words = bench.communicate(timeout=STOP_TIMEOUT_S)[1].decode()
    assert bench.returncode == 1, words
    assert words.endswith("Aborted!\n")
    assert wait_readable([worker], STOP_TIMEOUT_S), "the worker of its program goes on"
    os.close(worker)


def test_two_rounds_are_no_claim() -> None:
    assert Ratio(1.5, 1.4, 1.6, goal=1.2, num_rounds=2).verdict == "too few rounds"
