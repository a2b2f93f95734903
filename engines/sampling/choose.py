"""The random choice: temperature, top_k, top_p, min_p, then the inverse of the cumulative distribution.

Sorting a whole vocabulary is what sampling costs, and nearly always the choice falls into the few likeliest tokens. So
only those are sorted first, beside the weight of the whole row. A row is decided by them when nothing beyond them can
change its result; else it is done again with everything sorted. Both give the same token.

`engines.sampling.native` does the same in C++. The two add in another order, so a sum may differ in its last bits, and
a token only where the uniform number lies within those bits of a boundary: once in about 10^13 choices.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_CANDIDATES = 64
VANISHES = -700.0  # e^x is so small that a token has no weight: it is never chosen (cpp/simd_double.h)


@dataclass(frozen=True, slots=True)
class Filters:
    """Per row, `[num_rows]` float64 (`top_k` int64, 0 is off). `uniform` in [0, 1) makes the choice."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniform: Tensor

    @classmethod
    def of(cls, columns: NDArray[np.float64]) -> Filters:
        """`columns` `[5, num_rows]`: temperature, top_k, top_p, min_p, uniform."""
        temperature, top_k, top_p, min_p, uniform = torch.from_numpy(columns)
        return cls(temperature, top_k.long(), top_p, min_p, uniform)

    def on(self, device: torch.device) -> Filters:
        """The same where the logits are."""
        columns = (self.temperature, self.top_k, self.top_p, self.min_p, self.uniform)
        return Filters(*(column.to(device) for column in columns))

    def of_rows(self, row_idx: Tensor) -> Filters:
        return Filters(
            self.temperature[row_idx],
            self.top_k[row_idx],
            self.top_p[row_idx],
            self.min_p[row_idx],
            self.uniform[row_idx],
        )


def choose(logits: Tensor, filters: Filters) -> Tensor:
    """`[num_rows]` int64 token ids for `logits` `[num_rows, vocab]` fp32. Equal logits are ordered by lowest id."""
    vocab_size, filters = logits.shape[1], filters.on(logits.device)
    if vocab_size <= NUM_CANDIDATES:
        return _choose_among(logits, filters, vocab_size)[0]
    tokens, is_decided = _choose_among(logits, filters, NUM_CANDIDATES)
    if not bool(is_decided.all()):
        rest = (~is_decided).nonzero().flatten()
        tokens[rest] = _choose_among(logits[rest], filters.of_rows(rest), vocab_size)[0]
    return tokens


def _choose_among(logits: Tensor, filters: Filters, num_candidates: int) -> tuple[Tensor, Tensor]:
    """(token ids, whether the candidates beyond these could not have changed them)."""
    vocab_size = logits.shape[1]
    is_all = num_candidates == vocab_size
    candidates, ids = _sorted_candidates(logits, num_candidates)
    values, coldness = candidates.double(), (1.0 / filters.temperature)[:, None]
    rank = torch.arange(num_candidates, device=logits.device)
    weights = _weights((values - values[:, :1]) * coldness)
    # Of the whole row, and of what top_k leaves of it: top_p looks at that, normalised.
    whole = _weights((logits.double() - values[:, :1]) * coldness).sum(-1, keepdim=True)
    top_k = torch.where(filters.top_k > 0, filters.top_k.clamp(max=vocab_size), vocab_size)[:, None]
    cumulative = weights.cumsum(-1)
    has_top_k = top_k <= num_candidates
    mass = torch.where(top_k < vocab_size, cumulative.gather(1, top_k.clamp(max=num_candidates) - 1), whole)
    top_p = filters.top_p[:, None]
    in_top_p = (top_p >= 1.0) | ((cumulative - weights) / mass < top_p)
    keep = (rank < top_k) & in_top_p & (weights >= filters.min_p[:, None]) & (weights > 0.0)
    keep[:, 0] = True
    # Each filter keeps a prefix of the sorted candidates, and so do all together.
    num_kept = keep.sum(-1, keepdim=True)
    is_unfiltered = (top_k >= vocab_size) & (top_p >= 1.0) & (filters.min_p[:, None] <= 0.0)
    total = torch.where(is_unfiltered, whole, cumulative.gather(1, num_kept - 1))
    position = (cumulative <= filters.uniform[:, None] * total).sum(-1, keepdim=True)
    is_inside = position < num_kept
    position = torch.minimum(position, num_kept - 1)
    chosen = ids.gather(1, position)[:, 0]
    if is_all:
        return chosen, torch.ones_like(chosen, dtype=torch.bool)
    # Which of several equal logits got in at the end of the candidates is arbitrary: nothing may depend on those.
    edge = values[:, -1:]
    ends_inside = values.gather(1, num_kept - 1) > edge
    falls_inside = is_inside & (values.gather(1, position) > edge)
    is_mass_known = has_top_k | (top_k >= vocab_size)
    decided = is_mass_known & torch.where(is_unfiltered, falls_inside, ends_inside)
    return chosen, decided[:, 0]


def _weights(below: Tensor) -> Tensor:
    """Of tokens that lie so far below the likeliest, whose weight is exactly 1."""
    return torch.where(below < VANISHES, 0.0, torch.exp(below))


def _sorted_candidates(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, descending; equal ones by id."""
    if num_candidates == logits.shape[1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = logits.topk(num_candidates, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)
