"""Which tokens may not be chosen: all but the allowed ones, ends of bad words, end tokens that come too early.

A mask is -inf, so it commutes with biases and penalties. The masks come in this order, and one that would leave a row
nothing to choose is not applied to that row: the requests for an end of `min_tokens` or for no bad word give way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.sampling.row import SamplingRow

_NEVER = float("-inf")


def mask_logits(logits: Tensor, rows: dict[int, SamplingRow], eos_token_ids: tuple[int, ...]) -> None:
    """Change `rows` of `logits` `[any, vocab]` fp32 in place. Ids beyond the vocabulary are ignored."""
    _keep_allowed(logits, rows)
    _forbid(logits, {i: bad_word_ends(row) for i, row in rows.items() if row.params.bad_word_ids})
    _forbid(logits, {i: _early_ends(row, eos_token_ids) for i, row in rows.items() if row.params.min_tokens})


def bad_word_ends(row: SamplingRow) -> list[int]:
    """Ids that would complete a bad word after the output so far; words of one id always do."""
    output = row.output_ids
    return [
        word[-1]
        for word in row.params.bad_word_ids
        if len(word) == 1 or (len(output) >= len(word) - 1 and tuple(output[1 - len(word) :]) == word[:-1])
    ]


def _early_ends(row: SamplingRow, eos_token_ids: tuple[int, ...]) -> list[int]:
    return [*eos_token_ids, *row.params.stop_token_ids] if row.index < row.params.min_tokens else []


def _keep_allowed(logits: Tensor, rows: dict[int, SamplingRow]) -> None:
    limited = [i for i, row in rows.items() if row.params.allowed_token_ids]
    if not limited:
        return
    pairs = [(k, token) for k, i in enumerate(limited) for token in rows[i].params.allowed_token_ids]
    row_idx, tokens = _inside(pairs, logits.shape[1])
    is_allowed = torch.zeros(len(limited), logits.shape[1], dtype=torch.bool, device=logits.device)
    is_allowed[row_idx, tokens] = True
    is_allowed |= ~is_allowed.any(-1, keepdim=True)
    logits[limited] = logits[limited].masked_fill(~is_allowed, _NEVER)


def _forbid(logits: Tensor, ids_by_row: dict[int, list[int]]) -> None:
    forbidden = [i for i, ids in ids_by_row.items() if ids]
    if not forbidden:
        return
    row_idx, tokens = _inside([(k, token) for k, i in enumerate(forbidden) for token in ids_by_row[i]], logits.shape[1])
    part = logits[forbidden]
    part[row_idx, tokens] = _NEVER
    leaves_something = (part > _NEVER).any(-1, keepdim=True)
    logits[forbidden] = torch.where(leaves_something, part, logits[forbidden])


def _inside(pairs: list[tuple[int, int]], vocab_size: int) -> tuple[list[int], list[int]]:
    known = [(row, token) for row, token in pairs if 0 <= token < vocab_size]
    return [row for row, _ in known], [token for _, token in known]
