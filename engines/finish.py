"""When a choice is finished, as far as token ids can tell. Stop strings are text, so the front finds those."""

from __future__ import annotations

from dataclasses import dataclass

from engines.params import SamplingParams
from engines.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Finish:
    """`reason` is "stop" or "length"; `stop_reason` is the id of `stop_token_ids` that ended it, None for EOS."""

    reason: str
    stop_reason: int | None = None


@dataclass(frozen=True, slots=True)
class FinishRule:
    """End conditions of a model: its end tokens and its context."""

    eos_token_ids: frozenset[int]
    max_model_len: int

    def check(self, params: SamplingParams, num_prompt_tokens: int, output_ids: list[int]) -> Finish | None:
        """The end that the last of `output_ids` brings, or None. A stop id counts only after `min_tokens` ids."""
        if not output_ids:
            return None
        last = output_ids[-1]
        if params.constraint is not None and last in self.eos_token_ids:
            return Finish("stop")  # it could only be chosen because the constraint was met, and nothing can follow
        if len(output_ids) > params.min_tokens:
            if last in params.stop_token_ids:
                return Finish("stop", last)
            if last in self.eos_token_ids and not params.ignore_eos:
                return Finish("stop")
        if len(output_ids) >= params.max_tokens or num_prompt_tokens + len(output_ids) >= self.max_model_len:
            return Finish("length")
        return None

    def of(self, sequence: Sequence) -> Finish | None:
        """The end that its last token brings, or None."""
        return self.check(sequence.params, len(sequence.prompt_token_ids), sequence.output_token_ids)
