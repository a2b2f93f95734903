"""What changes logits before the choice: bias, penalties, masks. In this order."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.sampling.masks import mask_logits
from engines.sampling.row import SamplingRow


def adjust_logits(logits: Tensor, rows: list[SamplingRow], eos_token_ids: tuple[int, ...]) -> None:
    """Change `logits` `[num_rows, vocab]` fp32 in place. Ids beyond the vocabulary are ignored."""
    _add_bias(logits, rows)
    _penalise(logits, rows)
    mask_logits(logits, rows, eos_token_ids)


def _add_bias(logits: Tensor, rows: list[SamplingRow]) -> None:
    entries = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.params.logit_bias.items()]
    entries = [entry for entry in entries if 0 <= entry[1] < logits.shape[1]]
    if entries:
        row_idx, tokens, biases = zip(*entries, strict=True)
        logits[list(row_idx), list(tokens)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)


def _penalise(logits: Tensor, rows: list[SamplingRow]) -> None:
    """Repetition over prompt and output (CTRL, Keskar et al. 2019); frequency and presence over the output (OpenAI)."""
    repeating = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if repeating:
        row_idx, tokens, _ = _counts([(i, rows[i].prompt_ids + rows[i].output_ids) for i in repeating], logits)
        penalty = logits.new_tensor([row.params.repetition_penalty for row in rows])[row_idx]
        seen = logits[row_idx, tokens]
        logits[row_idx, tokens] = torch.where(seen > 0, seen / penalty, seen * penalty)
    counting = [i for i, row in enumerate(rows) if row.params.frequency_penalty or row.params.presence_penalty]
    if counting:
        row_idx, tokens, counts = _counts([(i, rows[i].output_ids) for i in counting], logits)
        frequency = logits.new_tensor([row.params.frequency_penalty for row in rows])[row_idx]
        presence = logits.new_tensor([row.params.presence_penalty for row in rows])[row_idx]
        logits[row_idx, tokens] -= frequency * counts + presence


def _counts(ids_by_row: list[tuple[int, list[int]]], logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row, token id, occurrences) of each distinct id of each row; an id is then in no two entries of a row.

    They are counted on the CPU, where the ids are, and leave for the device of `logits` in one copy.
    """
    vocab_size = logits.shape[1]
    keys = [
        torch.tensor([token for token in ids if token < vocab_size], dtype=torch.int64) + i * vocab_size
        for i, ids in ids_by_row
    ]
    unique, counts = torch.stack(torch.unique(torch.cat(keys), return_counts=True)).to(logits.device)
    return torch.div(unique, vocab_size, rounding_mode="floor"), unique % vocab_size, counts
