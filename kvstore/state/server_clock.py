"""The state server's clock, told on this process's monotonic clock. Pure.

A call that was sent at `s` and answered at `r` (ours) and brought the server's time `t` says that `t - ours` lies
between `t - r` and `t - s` (Cristian 1989). Every call narrows that interval; between calls it widens by what two
clocks may drift. So a slow call does no harm, and two processes that each know the server's clock can relate their
times without ever comparing their own clocks.

    known   |--------------------|          widened by DRIFT x time since
    call           |----------------|       t - r .. t - s
    known          |-------------|
"""

from __future__ import annotations

from typing import Final

DRIFT: Final = 100e-6  # of two quartz clocks against each other


class ServerClock:
    """Owned by one thread."""

    def __init__(self) -> None:
        self._low_s = self._high_s = 0.0  # server minus ours, at `_at_s`
        self._at_s: float | None = None

    @property
    def is_known(self) -> bool:
        return self._at_s is not None

    @property
    def half_width_s(self) -> float:
        """How far off the last narrowing left it at most; infinite before the first."""
        return (self._high_s - self._low_s) / 2 if self.is_known else float("inf")

    def note(self, *, sent_s: float, replied_s: float, server_ms: float) -> None:
        """A call that brought the server's time. One that contradicts the ones before was answered by a clock that was
        set, or by another server: only it counts then."""
        low_s, high_s = server_ms / 1000 - replied_s, server_ms / 1000 - sent_s
        if self._at_s is not None:
            drift_s = DRIFT * max(replied_s - self._at_s, 0.0)
            kept = max(low_s, self._low_s - drift_s), min(high_s, self._high_s + drift_s)
            if kept[0] <= kept[1]:
                low_s, high_s = kept
        self._low_s, self._high_s, self._at_s = low_s, high_s, replied_s

    def server_ms(self, local_s: float) -> float | None:
        """What the server's clock showed at `local_s`, or None before the first call."""
        return (local_s + self._offset_s) * 1000 if self.is_known else None

    def local_s(self, server_ms: float, *, at_most_s: float) -> float:
        """Our time at `server_ms`; `at_most_s` (ours, when the answer was here) where it would be later or unknown."""
        return min(server_ms / 1000 - self._offset_s, at_most_s) if self.is_known else at_most_s

    @property
    def _offset_s(self) -> float:
        return (self._low_s + self._high_s) / 2
