"""One token to choose: which logits, whose parameters, which place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import force_setattr

from engines.params import SamplingParams
from engines.sampling.token_counts import TokenCounts

if TYPE_CHECKING:
    from engines.structured.state import GrammarState


class SamplingRow(msgspec.Struct, frozen=True):
    """`index` is the position among the output ids that the token will have; `output_ids` are those before it.

    A row follows its sequence: the lists are the sequence's own, so the same row serves for every token.

    Attributes:
        is_plain: the choice is the largest logit as it is, and nobody asks for its logprob.
    """

    params: SamplingParams
    seed: int
    choice: int
    prompt_ids: list[int]
    output_ids: list[int]
    grammar: GrammarState | None = None
    counts: TokenCounts | None = None
    is_plain: bool = False
    _is_always_adjusted: bool = False

    def __post_init__(self) -> None:
        params = self.params
        is_adjusted = bool(params.logit_bias or params.allowed_token_ids or params.bad_word_ids or params.has_penalties)
        is_unchanged = not is_adjusted and not params.min_tokens and self.grammar is None
        force_setattr(self, "_is_always_adjusted", is_adjusted)
        force_setattr(self, "is_plain", is_unchanged and params.is_greedy and params.logprobs is None)
        if self.counts is None and params.has_penalties:
            force_setattr(self, "counts", TokenCounts(self.prompt_ids, self.output_ids))

    @property
    def index(self) -> int:
        return len(self.output_ids)

    @property
    def needs_adjustment(self) -> bool:
        """Whether its logits are changed before the choice."""
        return self._is_always_adjusted or self.index < self.params.min_tokens
