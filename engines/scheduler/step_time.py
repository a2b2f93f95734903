"""How long a step takes, by its tokens: a straight line through the recent steps of this engine. Pure.

    seconds
      |        . '  per_token_s: what one more token costs
      |   . '
      | '   fixed_s: weights read once, calls, messages
      +---------------- tokens

Exponentially weighted least squares: the machine, the model and the contexts change, and old steps stop counting. One
step that the machine disturbed is cut down to `MAX_SURPRISE` times what was expected of it.
"""

from __future__ import annotations

from typing import Final

MIN_STEPS: Final = 8
MAX_SURPRISE: Final = 3.0
_MEMORY: Final = 0.98  # weight of what is known, at each step
_MIN_SPREAD: Final = 0.05  # of the tokens of the steps, relative to their mean: less, and there is no slope to see


class StepTimeModel:
    """Owned by the engine thread, which tells it of each step."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._weight = self._tokens = self._seconds = self._tokens2 = self._product = 0.0
        self.fixed_s = self.per_token_s = 0.0

    @property
    def is_known(self) -> bool:
        """Whether steps of different sizes were seen, enough to tell the two parts apart."""
        return self.per_token_s > 0.0

    def expected_s(self, num_tokens: int) -> float:
        return self.fixed_s + self.per_token_s * num_tokens

    def utilization(self, num_tokens: int) -> float:
        """Share of the step that is the tokens' own: its rate of tokens over that of an endless step."""
        return self.per_token_s * num_tokens / self.expected_s(num_tokens)

    def observe(self, num_tokens: int, elapsed_s: float) -> None:
        if self.is_known:
            elapsed_s = min(elapsed_s, MAX_SURPRISE * self.expected_s(num_tokens))
        self._num_steps += 1
        for name, value in (
            ("_weight", 1.0),
            ("_tokens", num_tokens),
            ("_seconds", elapsed_s),
            ("_tokens2", num_tokens * num_tokens),
            ("_product", num_tokens * elapsed_s),
        ):
            setattr(self, name, getattr(self, name) * _MEMORY + value)
        if self._num_steps >= MIN_STEPS:
            self._fit()

    def _fit(self) -> None:
        mean_tokens, mean_s = self._tokens / self._weight, self._seconds / self._weight
        variance = self._tokens2 / self._weight - mean_tokens * mean_tokens
        if variance > (_MIN_SPREAD * mean_tokens) ** 2:
            slope = (self._product / self._weight - mean_tokens * mean_s) / variance
            # Never more than all of the mean: a step without tokens takes some time.
            self.per_token_s = min(max(slope, 0.0), mean_s / mean_tokens)
        self.fixed_s = max(mean_s - self.per_token_s * mean_tokens, 0.0)
