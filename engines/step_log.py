"""A line per step, for profiling and for `celeriac bench engine --isolation`: what was in it, how long it took.

Written where $CELERIAC_STEP_LOG (a folder) says: `<folder>/<incarnation>.steps`, tab-separated
num_seqs, num_tokens, num_context_tokens, milliseconds. Buffered, so that it costs microseconds per step.
"""

from __future__ import annotations

import os
from pathlib import Path

from engines.scheduler.plan import StepPlan

VARIABLE = "CELERIAC_STEP_LOG"
FLUSH_EVERY_STEPS = 64


class StepLog:
    """Owned by the engine thread."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lines: list[str] = []

    @classmethod
    def from_environment(cls, incarnation: str) -> StepLog | None:
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder) / f"{incarnation}.steps") if folder else None

    def add(self, plan: StepPlan, elapsed_s: float) -> None:
        context = sum(item.start + item.num_new_tokens for item in plan.scheduled)
        self._lines.append(f"{len(plan.scheduled)}\t{plan.num_tokens}\t{context}\t{elapsed_s * 1e3:.4f}\n")
        if len(self._lines) >= FLUSH_EVERY_STEPS:
            self.flush()

    def flush(self) -> None:
        self._file.write("".join(self._lines))
        self._file.flush()
        self._lines.clear()
