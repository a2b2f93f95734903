"""Back-pressure from the decode workers, as a prefill worker feels it: their grants and refusals. Pure.

    refused (they are full)  -> share halves, at most once per round of refusals; the next round comes later
    granted (there is room)  -> share grows by a step; the next refusal waits the shortest time again

`share` of the usual batch: while decode is full, prompts are computed in small batches, so that what is finished can
leave one by one; when it empties, batches grow again. Additive increase, multiplicative decrease: after TCP (Jacobson,
SIGCOMM 1988).
"""

from __future__ import annotations

from typing import Final

MIN_SHARE: Final = 1 / 16
GROWTH: Final = 1 / 16  # per grant
MIN_RETRY_S: Final = 0.03  # a decode worker frees blocks at the pace of its steps
MAX_RETRY_S: Final = 0.24


class DecodePressure:
    """Owned by the engine thread.

    Attributes:
        share: of its usual size that a batch may have.
        retry_at_s: until then full decode workers are left alone.
    """

    def __init__(self) -> None:
        self.share = 1.0
        self.retry_at_s = 0.0
        self._retry_s = MIN_RETRY_S

    def refused(self, now_s: float) -> None:
        """Every decode worker that was asked is full."""
        if now_s < self.retry_at_s:
            return  # others of the same round: they say the same
        self.share = max(self.share / 2, MIN_SHARE)
        self.retry_at_s = now_s + self._retry_s
        self._retry_s = min(self._retry_s * 2, MAX_RETRY_S)

    def granted(self) -> None:
        self.share = min(self.share + GROWTH, 1.0)
        self._retry_s = MIN_RETRY_S

    def of(self, limit: int) -> int:
        """`limit` under this pressure, at least 1."""
        return max(1, round(limit * self.share))
