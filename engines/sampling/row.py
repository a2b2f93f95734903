"""One token to choose: which logits, whose parameters, which place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from engines.params import SamplingParams

if TYPE_CHECKING:
    from engines.structured.state import GrammarState


class SamplingRow(msgspec.Struct, frozen=True):
    """`index` is the position among the output ids that the token will have; `output_ids` are those before it.

    A struct, as `ScheduledSequence` and `AttentionRow` are: one is made per sequence and step, and making a frozen
    dataclass takes four times as long.
    """

    params: SamplingParams
    seed: int
    choice: int
    prompt_ids: list[int]
    output_ids: list[int]
    grammar: GrammarState | None = None

    @property
    def index(self) -> int:
        return len(self.output_ids)

    @property
    def needs_adjustment(self) -> bool:
        """Whether its logits are changed before the choice."""
        params = self.params
        return bool(
            params.logit_bias
            or params.allowed_token_ids
            or params.bad_word_ids
            or params.repetition_penalty != 1.0
            or params.frequency_penalty
            or params.presence_penalty
            or self.index < params.min_tokens
        )
