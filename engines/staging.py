"""Numbers of a step on their way to the device: packed end to end, one copy, which nobody waits for.

On a GPU they leave from pinned memory, without which a copy stops the thread that asks for it. On a CPU nothing moves.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_Numbers = NDArray[np.int64]


class Staging:
    """Owned by the engine thread. What it returns is valid for as long as the caller likes."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._is_gpu = self._device.type == "cuda"
        self._host = torch.empty(0, dtype=torch.int64)
        self._copied: torch.cuda.Event | None = None

    def send(self, *arrays: _Numbers) -> tuple[Tensor, ...]:
        """Each of `arrays`, one dimension each, as a tensor of the device."""
        if self._device.type == "cpu":
            return tuple(torch.from_numpy(numbers) for numbers in arrays)
        packed = self._pack(arrays).to(self._device, non_blocking=True)
        self._mark()
        return torch.split(packed, [len(numbers) for numbers in arrays])

    def fill(self, target: Tensor, *arrays: _Numbers) -> None:
        """Overwrite `target`, one dimension, int64, on the device, with all of `arrays`; they must be as long as it."""
        target.copy_(self._pack(arrays), non_blocking=True)
        self._mark()

    def _pack(self, arrays: tuple[_Numbers, ...]) -> Tensor:
        size = sum(len(numbers) for numbers in arrays)
        if self._copied is not None:
            self._copied.synchronize()  # the step before may have sampled nothing, so that nobody waited for it
        if len(self._host) < size:
            self._host = torch.empty(2 * size, dtype=torch.int64, pin_memory=self._is_gpu)
        packed = self._host[:size]
        np.concatenate(arrays, out=packed.numpy())
        return packed

    def _mark(self) -> None:
        if self._is_gpu:
            self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()
