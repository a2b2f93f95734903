"""The largest logit of each row: what greedy requests want, and where NaN shows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.ext.library import Kernels


@dataclass(frozen=True, slots=True)
class GroupMaxima:
    """The largest of each `group` neighbouring logits, the last group maybe shorter.

    Attributes:
        values: `[num_rows, num_groups or more]` fp32, C-contiguous; what is behind the groups means nothing.
    """

    values: NDArray[np.float32]
    group: int


def find_peaks(logits: Tensor, kernels: Kernels | None) -> tuple[list[int], list[int]]:
    """(the first of the largest of each row, the rows with a NaN, whose id means nothing).

    Args:
        logits: `[num_rows, vocab]` fp32. With `kernels` on a CPU one pass finds both.
    """
    if logits.device.type != "cpu":
        is_nan = logits.amax(-1).isnan()  # NaN wins every maximum
        # One copy from the device, which waits for all that the step has computed.
        found = torch.stack((logits.argmax(-1), is_nan.long())).tolist()
        return found[0], [i for i, broken in enumerate(found[1]) if broken]
    if kernels is None:
        return largest(logits), logits.amax(-1).isnan().nonzero().flatten().tolist()
    logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    ids, broken = np.empty(num_rows, dtype=np.int64), np.empty(num_rows, dtype=np.bool_)
    kernels.find_peaks(
        num_rows, vocab_size, logits.data_ptr(), ids.ctypes.data, broken.ctypes.data, torch.get_num_threads()
    )
    return ids.tolist(), broken.nonzero()[0].tolist()


def largest(logits: Tensor) -> list[int]:
    """The first of the largest logits of each row. numpy's search is ten times faster than torch's on a CPU."""
    ids: list[int] = (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    return ids
