"""How far a fast path's result lies from a plain one's, and how far it may."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the norm of a row. What is wrong (a block of another sequence, a stale length) is off by about all of it; other
# orders of addition through all layers of a model are not.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest |found - expected| / |expected| of any row, in fp32; infinite where something is not a number.

    Rows are the first dimension. Waits for the device.
    """
    if found.shape != expected.shape:
        return float("inf")
    wrong = (found.float() - expected.float()).flatten(1).norm(dim=1)
    error = float((wrong / expected.float().flatten(1).norm(dim=1).clamp_min(1e-20)).max())
    return error if error == error else float("inf")  # NaN is not equal to itself
