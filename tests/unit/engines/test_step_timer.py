"""The step timer: every part gets its own time, and nothing of one step is counted in the next."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engines.messages import Tokens
from engines.params import SamplingParams
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.step_timer import OFF, StepProfile, TimedScheduler, timed_send
from kvstore.clock import VirtualClock
from tests.unit.engines.engine_loop import make_sequence

PLAN = StepPlan(1, (ScheduledSequence(make_sequence("r", [1, 2, 3], SamplingParams(max_tokens=4)), 0, 3),))


class SlowScheduler:
    """Takes 2 s to schedule and 1 s to complete; has nothing to do when `plan` is None."""

    num_waiting = num_running = 0

    def __init__(self, clock: VirtualClock, plan: StepPlan | None) -> None:
        self._clock = clock
        self._plan = plan

    def schedule(self, now_s: float) -> StepPlan | None:  # noqa: ARG002 - the interface
        self._clock.advance(2.0)
        return self._plan

    def complete(self, plan: StepPlan, sampled: object) -> None:  # noqa: ARG002 - the interface
        self._clock.advance(1.0)


def written(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_part_gets_its_own_time(tmp_path: Path) -> None:
    clock = VirtualClock()
    profile = StepProfile(tmp_path / "x.parts", clock)
    scheduler = TimedScheduler(SlowScheduler(clock, PLAN), profile)  # type: ignore[arg-type]

    scheduler.schedule(0.0)
    clock.advance(5.0)
    profile.split("forward")
    scheduler.complete(PLAN, {})
    clock.advance(0.5)  # finish rules
    timed_send(lambda _: clock.advance(0.25), profile)(Tokens(1, []))
    profile.end_step(PLAN, 8.75)
    profile.flush()

    (step,) = written(tmp_path / "x.parts")
    assert (step["num_seqs"], step["num_tokens"], step["step_ms"]) == (1, 3, pytest.approx(8750))
    parts = {"schedule": 2000, "forward": 5000, "complete": 1000, "send": 250, "other": 500}
    assert step["parts_ms"] == pytest.approx(parts)


def test_waiting_for_work_belongs_to_no_step(tmp_path: Path) -> None:
    clock = VirtualClock()
    profile = StepProfile(tmp_path / "x.parts", clock)

    TimedScheduler(SlowScheduler(clock, None), profile).schedule(0.0)  # type: ignore[arg-type]
    clock.advance(3.0)
    profile.split("forward")
    profile.end_step(PLAN, 3.0)
    profile.flush()

    assert written(tmp_path / "x.parts")[0]["parts_ms"] == pytest.approx({"forward": 3000, "other": 0})


def test_the_timer_that_is_off_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CELERIAC_STEP_PROFILE", raising=False)

    assert StepProfile.from_environment("x") is None
    OFF.split("forward")
    OFF.end_step(PLAN, 1.0)

    assert list(tmp_path.iterdir()) == []


def test_cpu_time_is_told_apart_from_time_that_passed(tmp_path: Path) -> None:
    clock, cpu = VirtualClock(), VirtualClock()
    profile = StepProfile(tmp_path / "x.parts", clock, cpu)
    clock.advance(9.0)  # waiting for a core
    cpu.advance(1.0)
    profile.split("metadata")
    profile.end_step(PLAN, 9.0)
    profile.flush()

    (step,) = written(tmp_path / "x.parts")
    assert (step["parts_ms"], step["cpu_ms"]) == (
        {"metadata": pytest.approx(9000), "other": 0.0},
        {"metadata": pytest.approx(1000), "other": 0.0},
    )
