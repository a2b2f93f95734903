"""How many tokens of a sequence are worth guessing, by how its last guesses went. Pure."""

from __future__ import annotations

from typing import Final

WORTHWHILE: Final = 0.4  # a guess is computed if its chance to be kept is at least this
PROBE_EVERY: Final = 16  # steps between guesses of one token where nothing seems worth guessing
_MEMORY: Final = 0.85  # weight of what is known, at each verification
_PRIOR: Final = (3.2, 4.0)  # kept, tried: optimistic, so that the first guess is a long one


class Acceptance:
    """Of one sequence: the chance that a guess is kept, given that those before it were."""

    def __init__(self) -> None:
        self._kept, self._tried = _PRIOR
        self._num_idle = 0

    @property
    def rate(self) -> float:
        return self._kept / self._tried

    def observe(self, *, num_drafted: int, num_kept: int) -> None:
        """`num_kept` of `num_drafted` guesses were right; the first wrong one ended the trial."""
        num_tried = num_kept + (num_kept < num_drafted)
        self._kept = self._kept * _MEMORY + num_kept
        self._tried = self._tried * _MEMORY + num_tried

    def draft_length(self, limit: int) -> int:
        """Guesses worth a place in the step, at most `limit`: as long as rate ** length >= `WORTHWHILE`."""
        chance = rate = self.rate
        length = 0
        while length < limit and chance >= WORTHWHILE:
            length += 1
            chance *= rate
        if length:
            self._num_idle = 0
            return length
        self._num_idle += 1
        if self._num_idle < PROBE_EVERY:
            return 0
        self._num_idle = 0
        return min(limit, 1)
