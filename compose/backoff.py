"""When a dead process is started again: at once, then later and later. Pure; the caller has the clock."""

from __future__ import annotations

from dataclasses import dataclass

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
STEADY_S = 60.0  # who ran this long starts afresh: its next death is a new story


@dataclass
class Backoff:
    """Of one process. A single death costs no delay; deaths in a row wait 0.5 s, 1 s, 2 s ... 30 s."""

    num_deaths_in_row: int = 0
    num_restarts: int = 0

    def delay_s(self, *, ran_s: float) -> float:
        """How long to wait after a death. Counts it."""
        if ran_s >= STEADY_S:
            self.num_deaths_in_row = 0
        self.num_deaths_in_row += 1
        self.num_restarts += 1
        if self.num_deaths_in_row == 1:
            return 0.0
        return float(min(FIRST_DELAY_S * 2 ** (self.num_deaths_in_row - 2), MAX_DELAY_S))
