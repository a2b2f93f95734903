"""A line per step, for profiling and for `celeriac bench engine --isolation`: what was in it, how long it took.

Written where $CELERIAC_STEP_LOG (a folder) says: `<folder>/<incarnation>.steps`, tab-separated
num_seqs, num_tokens, num_context_tokens, milliseconds, CPU milliseconds. Buffered: it costs microseconds per step.

CPU milliseconds are those of the engine thread since the end of the step before, messages included: on a machine that
others use too, they tell a longer step from a step that had to wait for a core.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from engines.scheduler.plan import StepPlan

VARIABLE = "CELERIAC_STEP_LOG"
FLUSH_EVERY_STEPS = 64


class StepLog:
    """Owned by the engine thread."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lines: list[str] = []
        self._cpu_s = time.thread_time()

    @classmethod
    def from_environment(cls, incarnation: str) -> StepLog | None:
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder) / f"{incarnation}.steps") if folder else None

    def add(self, plan: StepPlan, elapsed_s: float) -> None:
        context = sum(item.start + item.num_new_tokens for item in plan.scheduled)
        before_s, self._cpu_s = self._cpu_s, time.thread_time()
        times = f"{elapsed_s * 1e3:.4f}\t{(self._cpu_s - before_s) * 1e3:.4f}"
        self._lines.append(f"{len(plan.scheduled)}\t{plan.num_tokens}\t{context}\t{times}\n")
        if len(self._lines) >= FLUSH_EVERY_STEPS:
            self.flush()

    def flush(self) -> None:
        self._file.write("".join(self._lines))
        self._file.flush()
        self._lines.clear()
