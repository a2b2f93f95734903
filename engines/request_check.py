"""What an `Add` must be like before it may share a step with others: one that is not is refused by name.

The gateway checks what users send; this is for whatever comes past it. A token id that the model does not have would
fail the whole step, with everybody in it. Pure; no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from engines.messages import Add
from engines.params import SamplingParams


def fault_of(add: Add, *, vocab_size: int) -> str | None:
    """The first thing that is wrong, with what was expected; None for a good request."""
    return next(_faults(add, vocab_size), None)


def _faults(add: Add, vocab_size: int) -> Iterator[str]:
    if not add.prompt_ids:
        yield "the prompt has no tokens. Expected at least one."
    if not add.choices:
        yield "there are no choices. Expected a list of output ids, mostly empty, for each."
    for where, ids in [("prompt", add.prompt_ids), *((f"choice {c}", ids) for c, ids in enumerate(add.choices))]:
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            at = next(k for k, token_id in enumerate(ids) if not 0 <= token_id < vocab_size)
            yield f"token {at} of the {where} is {ids[at]}. Expected an id of the vocabulary, 0 to {vocab_size - 1}."
    if not -(2**63) <= add.seed < 2**64:
        yield f"seed is {add.seed}. Expected a whole number of 64 bits."
    yield from _parameter_faults(add.params)


def _parameter_faults(params: SamplingParams) -> Iterator[str]:
    if params.max_tokens < 1:
        yield f"max_tokens is {params.max_tokens}. Expected at least 1."
    if params.n < 1:
        yield f"n is {params.n}. Expected at least 1."
    if not 0 <= params.temperature < math.inf:
        yield f"temperature is {params.temperature}. Expected a number, 0 or above."
    if not 0 < params.top_p <= 1:
        yield f"top_p is {params.top_p}. Expected a number above 0, at most 1."
    if params.top_k < 0:
        yield f"top_k is {params.top_k}. Expected 0 (off) or a count."
    if not 0 <= params.min_p <= 1:
        yield f"min_p is {params.min_p}. Expected a number from 0 to 1."
    if not 0 < params.repetition_penalty < math.inf:
        yield f"repetition_penalty is {params.repetition_penalty}. Expected a number above 0."
    for name in ("frequency_penalty", "presence_penalty"):
        if not math.isfinite(value := getattr(params, name)):
            yield f"{name} is {value}. Expected a finite number."
    for token_id, bias in params.logit_bias.items():
        if not math.isfinite(bias):
            yield f"logit_bias of token {token_id} is {bias}. Expected a finite number."
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value < 0:
            yield f"{name} is {value}. Expected a count, 0 or above."
