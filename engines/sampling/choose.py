"""The random choice: temperature, top_k, top_p, min_p, then the inverse of the cumulative distribution.

Sorting a whole vocabulary is what sampling costs, and nearly always the choice falls into the few likeliest tokens. So
only those are sorted first, beside the weight of the whole row. A row is decided by them when nothing beyond them can
change its result; else it is done again with everything sorted. Both give the same token.

A weight is a whole number of units of 2^-43, so sums are exact in whatever order they are added.
`engines.sampling.native` does the same in C++ with the same weights (cpp/token_weights.h): the same tokens, on any CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NUM_CANDIDATES = 64
# Of `weigh`. Every operation on them is that of cpp/token_weights.h, one by one: change both or none.
UNITS: Final = 2.0**43  # the weight of the likeliest token
_OCTAVES: Final = 1.4426950408889634  # 1 / ln 2
_SIXTEENTHS: Final = 1.5 * 2.0**48  # adding it rounds to sixteenths
_POWER: Final = (  # 2^f = 1 + f * (... of these) for |f| <= 1/32, fitted at Chebyshev's nodes
    0.009618317140428106,
    0.05550541078374851,
    0.24022650691319433,
    0.6931471804009947,
)
# fmt: off
_SIXTEENTH_POWERS: Final = (  # 2^(j/16), rounded
    1.0, 1.0442737824274138, 1.0905077326652577, 1.1387886347566916, 1.189207115002721, 1.241857812073484,
    1.2968395546510096, 1.3542555469368927, 1.4142135623730951, 1.4768261459394993, 1.5422108254079407,
    1.6104903319492543, 1.681792830507429, 1.7562521603732995, 1.8340080864093424, 1.9152065613971474,
)
# fmt: on
_LEAST_OCTAVES: Final = -64
_BASES: Final = torch.tensor(  # UNITS * 2^(n/16), from n = 16 * _LEAST_OCTAVES on
    [UNITS * 2.0**octave * power for octave in range(_LEAST_OCTAVES, 1) for power in _SIXTEENTH_POWERS],
    dtype=torch.float64,
)


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
    weights = weigh(values - values[:, :1], coldness)
    # Of the whole row, and of what top_k leaves of it: top_p looks at that, normalised.
    whole = weigh(logits.double() - values[:, :1], coldness).sum(-1, keepdim=True)
    top_k = torch.where(filters.top_k > 0, filters.top_k.clamp(max=vocab_size), vocab_size)[:, None]
    cumulative = weights.cumsum(-1)
    has_top_k = top_k <= num_candidates
    mass = torch.where(top_k < vocab_size, cumulative.gather(1, top_k.clamp(max=num_candidates) - 1), whole)
    top_p = filters.top_p[:, None]
    in_top_p = (top_p >= 1.0) | ((cumulative - weights).double() / mass.double() < top_p)
    keep = (rank < top_k) & in_top_p & (weights.double() >= filters.min_p[:, None] * UNITS) & (weights > 0)
    keep[:, 0] = True
    # Each filter keeps a prefix of the sorted candidates, and so do all together.
    num_kept = keep.sum(-1, keepdim=True)
    is_unfiltered = (top_k >= vocab_size) & (top_p >= 1.0) & (filters.min_p[:, None] <= 0.0)
    total = torch.where(is_unfiltered, whole, cumulative.gather(1, num_kept - 1))
    position = (cumulative.double() <= filters.uniform[:, None] * total.double()).sum(-1, keepdim=True)
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


def weigh(below: Tensor, coldness: Tensor) -> Tensor:
    """int64 e^(below * coldness) in units of 2^-43; `below`: how far tokens lie below the likeliest, fp64.

    At 0 exactly 2^43; elsewhere within 6e-12 of the true one, and then rounded. Less than half a unit is no weight:
    so it is of -inf.
    """
    # NaN is infinity less infinity: such a row gives its first token.
    octaves = (below * (coldness * _OCTAVES)).nan_to_num_(nan=_LEAST_OCTAVES).clamp_(min=_LEAST_OCTAVES)
    whole = (octaves + _SIXTEENTHS).sub_(_SIXTEENTHS)
    fraction = octaves.sub_(whole)
    power = (fraction * _POWER[0]).add_(_POWER[1])
    for coefficient in (*_POWER[2:], 1.0):
        power.mul_(fraction).add_(coefficient)
    steps = whole.sub_(_LEAST_OCTAVES).mul_(16.0).long()
    return power.mul_(_BASES.to(below.device)[steps]).round_().long()


def _sorted_candidates(logits: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, descending; equal ones by id."""
    if num_candidates == logits.shape[1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    ids = logits.topk(num_candidates, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, order)
