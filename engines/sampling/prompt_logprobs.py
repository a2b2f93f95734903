"""Logprobs of given tokens, in slices: the logits of a whole prompt would not fit where its KV does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from engines.prompt_scores import PromptScores

ROWS_AT_ONCE: Final = 64  # fp32 logits of a vocabulary of 152k: 39 MB


def score_tokens(
    logits_of: Callable[[Tensor], Tensor], hidden: Tensor, token_ids: list[int], scores: PromptScores
) -> bool:
    """Add to `scores` how likely each of `token_ids` was after `hidden[i]`; further rows of `hidden` are not used.

    The values are the model's own, before temperature, penalties and bias. False if an output is NaN.
    """
    for lo in range(0, len(token_ids), ROWS_AT_ONCE):
        targets = torch.tensor(token_ids[lo : lo + ROWS_AT_ONCE], dtype=torch.int64, device=hidden.device)[:, None]
        logits = logits_of(hidden[lo : lo + len(targets)])
        if bool(logits.amax(-1).isnan().any()):
            return False
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, targets)
        ranks = (logprobs > chosen).sum(-1) + 1
        top_values, top_ids = _best(logprobs, min(scores.num_top, logprobs.shape[1]))
        scores.add(
            logprobs=_packed(chosen[:, 0].float()),
            ranks=_packed(ranks.int()),
            top_ids=_packed(top_ids.int()),
            top_logprobs=_packed(top_values.float()),
        )
    return True


def _best(logprobs: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, descending; equal ones by id: topk alone leaves their order open."""
    ids = logprobs.topk(num_top, dim=-1).indices.sort(dim=-1).values
    values, order = logprobs.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _packed(values: Tensor) -> bytes:
    packed: bytes = values.cpu().numpy().tobytes()
    return packed
