"""Sampling parameters of one request, as they travel from the gateway through the record to the engine.

Validated by the gateway (`webapp.openai`); the engine trusts the ranges. No torch here: the gateway imports this.
"""

from __future__ import annotations

import msgspec

from engines.structured.constraint import Constraint


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to choose tokens, and when to stop.

    Attributes:
        max_tokens: output tokens of each choice, at most. The gateway always fills it in.
        temperature: 0 means greedy.
        top_k: 0 means off.
        logprobs: None is off; 0 gives the chosen token's only; N also the N best.
        prompt_logprobs: the same for every prompt token but the first, counted once per choice.
        allowed_token_ids: only these may be chosen; empty allows all.
        bad_word_ids: sequences of ids that the output must not contain.
        constraint: what the output must match; its end ends the choice, whatever `min_tokens` and `ignore_eos` say.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: tuple[int, ...] = ()
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    constraint: Constraint | None = None

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens of the sequence change the logits."""
        return bool(self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty)
