"""Counter-based random numbers: one uniform per (seed, choice, index), with no state.

The same request gives the same tokens in any batch slot, on any worker, after any recovery, because nothing but the
position of the token decides its number. After splitmix64 (Steele, Lea, Flood; OOPSLA 2014), one round per word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1


class Streams:
    """The random numbers of some choices: all of them begin with the words of seed and choice, mixed once."""

    def __init__(self, seeds_and_choices: list[tuple[int, int]]) -> None:
        """Seeds may be any integer, taken modulo 2**64."""
        words = np.array([[seed & _MASK, choice] for seed, choice in seeds_and_choices], dtype=np.uint64).reshape(-1, 2)
        self._state = np.zeros(len(words), dtype=np.uint64)
        for column in words.T:
            self._state = _mixed_in(self._state, column)

    def at(self, indices: list[int]) -> NDArray[np.float64]:
        """`[num_choices]` float64 in [0, 1): of each choice its number `indices[i]`."""
        state = _mixed_in(self._state, np.array(indices, dtype=np.uint64))
        uniform: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform


def uniforms(counters: list[tuple[int, int, int]]) -> NDArray[np.float64]:
    """`[num_rows]` float64 in [0, 1), one per (seed, choice, index)."""
    return Streams([counter[:2] for counter in counters]).at([counter[2] for counter in counters])


def _mixed_in(state: NDArray[np.uint64], word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return _mix((state ^ word) + _GOLDEN)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
