"""Who chooses and scores tokens: C++ for logits on a CPU, else torch. Both mean the same (choose.py)."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.errors import KernelsUnavailable
from engines.ext.library import Kernels
from engines.sampling.choose import Filters, choose
from engines.sampling.native import NativeChooser
from engines.sampling.peaks import GroupMaxima

logger = logging.getLogger(__name__)


class TokenChooser(Protocol):
    """Owned by the engine thread. `row_idx` are the rows of `logits` `[any, vocab]` (fp32, no NaN) in question."""

    def choose(
        self, logits: Tensor, row_idx: list[int], columns: NDArray[np.float64], maxima: GroupMaxima | None = None
    ) -> list[int]:
        """A random token for each of `row_idx`.

        Args:
            columns: `[5, len(row_idx)]`: temperature, top_k (0 is off), top_p, min_p, uniform number.
            maxima: of `logits`, where they are known: they only save time.
        """

    def score(
        self, logits: Tensor, row_idx: list[int], chosen: list[int], num_top: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        """(the `num_top` likeliest ids, their logprobs and behind them that of `chosen`), per row.

        Descending, equal ones by id. No more than the vocabulary has.
        """


def find_chooser(kernels: Kernels | None) -> TokenChooser:
    """C++ where the model has kernels, too."""
    if kernels is None:
        return TorchChooser()
    try:
        return NativeChooser()
    except KernelsUnavailable as error:
        logger.warning("%s Tokens are chosen by torch, slower.", error)
        return TorchChooser()


class TorchChooser:
    """On whatever device the logits are."""

    def choose(
        self, logits: Tensor, row_idx: list[int], columns: NDArray[np.float64], _: GroupMaxima | None = None
    ) -> list[int]:
        chosen: list[int] = choose(_rows(logits, row_idx), Filters.of(columns)).tolist()
        return chosen

    def score(
        self, logits: Tensor, row_idx: list[int], chosen: list[int], num_top: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        logprobs = _rows(logits, row_idx).log_softmax(-1)
        # Sorted by (value, id): topk alone leaves the order of equal values open.
        best = logprobs.topk(min(num_top, logits.shape[1]), dim=-1).indices.sort(dim=-1).values
        values, order = logprobs.gather(1, best).sort(dim=-1, descending=True, stable=True)
        own = logprobs.gather(1, torch.tensor(chosen, device=logits.device)[:, None])
        return best.gather(1, order).tolist(), torch.cat((values, own), dim=1).tolist()


def _rows(logits: Tensor, row_idx: list[int]) -> Tensor:
    return logits if row_idx == list(range(len(logits))) else logits[row_idx]
