"""Where a step's time goes, part by part. Off unless $CELERIAC_STEP_PROFILE names a folder.

The engine thread runs through the parts in a fixed order, so one stamp at the end of each part is enough:

    poll -> front_messages -> kv_events -> schedule -> metadata -> forward -> logits -> sample -> complete -> send

`metadata` is what `begin_step` needs: ids, positions, slot mapping, block tables. `other` is what lies between parts:
hand-offs looking for a grant, stats, finish rules. Written to `<folder>/<incarnation>.parts`, one JSON object per step.

Beside the time that passed, each part has the CPU time of the engine thread: on a machine that others use too, it tells
work from waiting for a core. Parts that other threads help with (forward, logits, sample) need more of it than that.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import TYPE_CHECKING

from engines.scheduler.plan import StepPlan
from engines.sequence import Sequence
from kvstore.clock import Clock, now_s

if TYPE_CHECKING:
    from engines.messages import EngineMessage
    from engines.scheduler.scheduler import Scheduler

VARIABLE = "CELERIAC_STEP_PROFILE"
FLUSH_EVERY_STEPS = 16
OTHER = "other"


class StepTimer:
    """The timer that is off: a call costs what an empty method costs."""

    def split(self, part: str) -> None:
        """The time since the last split was spent in `part`."""

    def end_step(self, plan: StepPlan, elapsed_s: float) -> None:
        """The step is over; `elapsed_s` is what the step log calls its time: from `schedule` to `send`."""

    def reset(self) -> None:
        """Nothing was scheduled: what was measured belongs to no step."""


OFF = StepTimer()


class StepProfile(StepTimer):
    """Owned by the engine thread."""

    def __init__(self, path: Path, clock: Clock = now_s, cpu_clock: Clock = thread_time) -> None:
        self._file = path.open("a")
        self._clock, self._cpu_clock = clock, cpu_clock
        self._last_s, self._last_cpu_s = clock(), cpu_clock()
        self._parts_ms: dict[str, float] = defaultdict(float)
        self._cpu_ms: dict[str, float] = defaultdict(float)
        self._lines: list[str] = []

    @classmethod
    def from_environment(cls, incarnation: str) -> StepProfile | None:
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder) / f"{incarnation}.parts") if folder else None

    def split(self, part: str) -> None:
        now, cpu = self._clock(), self._cpu_clock()
        self._parts_ms[part] += (now - self._last_s) * 1e3
        self._cpu_ms[part] += (cpu - self._last_cpu_s) * 1e3
        self._last_s, self._last_cpu_s = now, cpu

    def end_step(self, plan: StepPlan, elapsed_s: float) -> None:
        self.split(OTHER)
        line = {
            "num_seqs": len(plan.scheduled),
            "num_tokens": plan.num_tokens,
            "step_ms": elapsed_s * 1e3,
            "parts_ms": {part: round(ms, 5) for part, ms in self._parts_ms.items()},
            "cpu_ms": {part: round(ms, 5) for part, ms in self._cpu_ms.items()},
        }
        self._lines.append(json.dumps(line) + "\n")
        if len(self._lines) >= FLUSH_EVERY_STEPS:
            self.flush()
        self.reset()

    def reset(self) -> None:
        self._parts_ms.clear()
        self._cpu_ms.clear()
        self._last_s, self._last_cpu_s = self._clock(), self._cpu_clock()

    def flush(self) -> None:
        self._file.write("".join(self._lines))
        self._file.flush()
        self._lines.clear()


class TimedScheduler:
    """A scheduler whose decisions are timed. Has the interface of the one inside."""

    def __init__(self, scheduler: Scheduler, timer: StepTimer) -> None:
        self._scheduler = scheduler
        self._timer = timer

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    def add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)

    def remove(self, seq_id: tuple[str, int]) -> None:
        self._scheduler.remove(seq_id)

    def schedule(self, now_s: float) -> StepPlan | None:
        self._timer.split(OTHER)
        plan = self._scheduler.schedule(now_s)
        self._timer.split("schedule")
        if plan is None:
            self._timer.reset()
        return plan

    def complete(self, plan: StepPlan, sampled: dict[tuple[str, int], list[int]]) -> None:
        self._timer.split(OTHER)
        self._scheduler.complete(plan, sampled)
        self._timer.split("complete")

    def next_wakeup_s(self, now_s: float) -> float | None:
        return self._scheduler.next_wakeup_s(now_s)


def timed_send(send: Callable[[EngineMessage], None], timer: StepTimer) -> Callable[[EngineMessage], None]:
    """`send`, with its time counted as the part `send`. Before it lie the finish rules: `other`."""

    def send_timed(message: EngineMessage) -> None:
        timer.split(OTHER)
        send(message)
        timer.split("send")

    return send_timed
