"""Batch limits that keep the gap between two tokens under its SLO. Pure.

    tokens of a step      what the step-time model says fits into the SLO beside the decode rows, times `caution`
    sequences at a time   grows by one while decode steps stay well below the SLO and all places are taken,
                          shrinks by a tenth when they are above it

`caution` falls with each mixed step that was too long and grows back with each that was not: it makes up for what the
straight line of the model does not know. A prompt always gets `MIN_CHUNK_TOKENS`, and one sequence always has a place:
an SLO that cannot be kept slows nobody down to nothing.
"""

from __future__ import annotations

from typing import Final

from engines.scheduler.plan import StepPlan
from engines.scheduler.step_time import StepTimeModel

MIN_CHUNK_TOKENS: Final = 32
MIN_CAUTION: Final = 0.1
COMFORT: Final = 0.8  # of the SLO: below it there is room for one more sequence
_SMOOTHING: Final = 0.2  # weight of the newest decode step


class ItlLimits:
    """Owned by the engine thread, which tells it of each step.

    Args:
        slo_ms: longest gap between two tokens of a sequence.
        step_time: shared with others; told of each step before this one is.
        max_num_seqs, max_num_batched_tokens: the limits that hold without an SLO, and are never exceeded.
    """

    def __init__(
        self, *, slo_ms: float, step_time: StepTimeModel, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self._slo_s = slo_ms / 1e3
        self._step_time = step_time
        self._max_num_batched_tokens = max_num_batched_tokens
        self._most_seqs = max_num_seqs
        self._caution = 1.0
        self._decode_s: float | None = None
        self.max_num_seqs = max_num_seqs

    def max_num_tokens(self, num_decoding: int) -> int:
        """Tokens of a step that has so many decode rows; without any there is no gap to keep short."""
        if not num_decoding:
            return self._max_num_batched_tokens
        if self._step_time.is_known:
            room_s = self._slo_s * self._caution - self._step_time.expected_s(num_decoding)
            num_chunk_tokens = int(room_s / self._step_time.per_token_s)
        else:
            num_chunk_tokens = int(self._max_num_batched_tokens * self._caution)
        return min(num_decoding + max(num_chunk_tokens, MIN_CHUNK_TOKENS), self._max_num_batched_tokens)

    def observe(self, plan: StepPlan, elapsed_s: float) -> None:
        num_decoding = sum(item.num_known_tokens == 1 for item in plan.scheduled)
        if not num_decoding:
            return
        is_late = elapsed_s > self._slo_s
        if plan.num_tokens > num_decoding:
            self._caution = max(self._caution * 0.7, MIN_CAUTION) if is_late else min(self._caution + 0.02, 1.0)
            return
        before_s = elapsed_s if self._decode_s is None else self._decode_s
        self._decode_s = before_s + _SMOOTHING * (elapsed_s - before_s)
        if self._decode_s > self._slo_s:
            self.max_num_seqs = max(min(self.max_num_seqs, num_decoding) * 9 // 10, 1)
            self._decode_s = None  # the smaller batch is judged by its own steps
        elif self._decode_s < COMFORT * self._slo_s and num_decoding >= self.max_num_seqs:
            self.max_num_seqs = min(self.max_num_seqs + 1, self._most_seqs)
