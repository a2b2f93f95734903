"""Choosing and scoring tokens in C++ (ext/cpp/choose.h): a pass or two over each row, rows in parallel."""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.ext.build import SAMPLING_SOURCES, load_library
from engines.sampling.peaks import GroupMaxima

_CHOOSE: Final[list[type]] = [c_int64, c_int64, *[c_void_p] * 4, c_int64, c_int64, c_void_p, c_int64]
_SCORE: Final[list[type]] = [c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64]

MAX_VOCAB_SIZE: Final = 2**19  # of more tokens the weights could be too large a sum (cpp/token_weights.h)


class NativeChooser:
    """`engines.sampling.chooser.TokenChooser` for logits on a CPU.

    Raises:
        KernelsUnavailable: it cannot be built or loaded.
    """

    def __init__(self) -> None:
        library = load_library(SAMPLING_SOURCES)
        self._choose, self._score = library.choose_tokens, library.score_tokens
        self._choose.restype = self._score.restype = None
        self._choose.argtypes, self._score.argtypes = _CHOOSE, _SCORE

    def choose(
        self, logits: Tensor, row_idx: list[int], columns: NDArray[np.float64], maxima: GroupMaxima | None = None
    ) -> list[int]:
        address, num_rows, vocab_size = _checked(logits, row_idx)
        assert columns.shape == (5, num_rows), columns.shape
        assert columns.flags.c_contiguous
        ids, index = np.empty(num_rows, dtype=np.int64), np.array(row_idx, dtype=np.int64)
        self._choose(
            num_rows,
            vocab_size,
            address,
            index.ctypes.data,
            columns.ctypes.data,
            *_arguments(maxima, logits),
            ids.ctypes.data,
            torch.get_num_threads(),
        )
        return list(ids.tolist())

    def score(
        self, logits: Tensor, row_idx: list[int], chosen: list[int], num_top: int
    ) -> tuple[list[list[int]], list[list[float]]]:
        address, num_rows, vocab_size = _checked(logits, row_idx)
        num_top = min(num_top, vocab_size)
        index, own = np.array(row_idx, dtype=np.int64), np.array(chosen, dtype=np.int64)
        ids = np.empty((num_rows, num_top), dtype=np.int64)
        logprobs = np.empty((num_rows, num_top + 1), dtype=np.float32)
        self._score(
            num_rows,
            vocab_size,
            address,
            index.ctypes.data,
            own.ctypes.data,
            num_top,
            ids.ctypes.data,
            logprobs.ctypes.data,
            torch.get_num_threads(),
        )
        return ids.tolist(), logprobs.tolist()


def _arguments(maxima: GroupMaxima | None, logits: Tensor) -> tuple[int | None, int, int]:
    """Where the maxima are, how far apart those of rows are, of how many logits each is."""
    if maxima is None:
        return None, 0, 0
    num_rows, stride = maxima.values.shape
    assert num_rows == len(logits), (num_rows, len(logits))
    assert stride * maxima.group >= logits.shape[1], (stride, maxima.group, logits.shape[1])
    return maxima.values.ctypes.data, stride, maxima.group


def _checked(logits: Tensor, row_idx: list[int]) -> tuple[int, int, int]:
    assert logits.is_contiguous()
    assert logits.dtype is torch.float32, logits.dtype
    assert logits.shape[1] <= MAX_VOCAB_SIZE, logits.shape
    assert 0 <= min(row_idx) <= max(row_idx) < len(logits), row_idx
    return logits.data_ptr(), len(row_idx), logits.shape[1]
