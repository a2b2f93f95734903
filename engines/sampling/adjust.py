"""What changes logits before the choice: bias, penalties, masks. In this order."""

from __future__ import annotations

from itertools import chain

import numpy as np
import torch
from torch import Tensor

from engines.sampling.masks import mask_logits
from engines.sampling.row import SamplingRow


def adjust_logits(logits: Tensor, rows: dict[int, SamplingRow], eos_token_ids: tuple[int, ...]) -> None:
    """Change `rows` of `logits` `[any, vocab]` fp32 in place. Ids beyond the vocabulary are ignored."""
    _add_bias(logits, rows)
    _penalise(logits, {i: row for i, row in rows.items() if row.params.has_penalties})
    mask_logits(logits, rows, eos_token_ids)


def _add_bias(logits: Tensor, rows: dict[int, SamplingRow]) -> None:
    biased = {i: row.params.logit_bias for i, row in rows.items() if row.params.logit_bias}
    if not biased:
        return
    counts = [len(bias) for bias in biased.values()]
    row_idx = np.repeat(np.fromiter(biased, dtype=np.int64), counts)
    tokens = np.fromiter(chain.from_iterable(biased.values()), dtype=np.int64, count=len(row_idx))
    values = chain.from_iterable(bias.values() for bias in biased.values())
    biases = np.fromiter(values, dtype=np.float32, count=len(row_idx))
    index, (added,) = _inside(logits, row_idx, tokens, biases)
    logits.view(-1)[index] += added


def _penalise(logits: Tensor, rows: dict[int, SamplingRow]) -> None:
    """Repetition over prompt and output (CTRL, Keskar et al. 2019); frequency and presence over the output (OpenAI)."""
    if not rows:
        return
    counted = [row.counts.up_to_date() for row in rows.values() if row.counts is not None]
    lengths = [len(ids) for ids, _ in counted]
    row_idx = np.repeat(np.fromiter(rows, dtype=np.int64), lengths)
    params = [row.params for row in rows.values()]
    # fp32 all through, also what is made of one number per row: so a row's result is that of its own numbers alone.
    by_row = np.array(
        [(each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in params], dtype=np.float32
    )
    repetition, frequency, presence = np.repeat(by_row, lengths, axis=0).T
    counts = np.concatenate([counts for _, counts in counted])
    subtracted = np.where(counts > 0, frequency * counts + presence, np.float32(0.0))
    ids = np.concatenate([ids for ids, _ in counted])
    index, (penalty, cost) = _inside(logits, row_idx, ids, repetition, subtracted)
    flat = logits.view(-1)
    seen = flat[index]
    flat[index] = torch.where(seen > 0, seen / penalty, seen * penalty) - cost


def _inside(
    logits: Tensor, row_idx: np.ndarray, tokens: np.ndarray, *values: np.ndarray
) -> tuple[Tensor, list[Tensor]]:
    """Places in the flattened logits, and `values` of them, on their device; ids beyond the vocabulary are left out.

    No place may be in it twice: what is written to one of them would be lost.
    """
    vocab_size = logits.shape[1]
    index = row_idx * vocab_size + tokens
    is_inside = (tokens >= 0) & (tokens < vocab_size)
    if not is_inside.all():
        index, values = index[is_inside], tuple(column[is_inside] for column in values)
    moved = [torch.from_numpy(np.ascontiguousarray(column)).to(logits.device) for column in (index, *values)]
    return moved[0], moved[1:]
