"""The distinct ids of a sequence and how often its output has each: what penalties need, kept token by token.

Counting a whole context again at every step would cost more than the rest of the step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MORE_IDS = 64  # room is made for so many at least


class TokenCounts:
    """Owned by the engine thread. `output_ids` is the sequence's own list: it may only grow."""

    def __init__(self, prompt_ids: list[int], output_ids: list[int]) -> None:
        self._output_ids = output_ids
        self._num_counted = 0
        distinct = dict.fromkeys(prompt_ids)
        self._place = {token: k for k, token in enumerate(distinct)}
        self._ids = np.array(list(distinct), dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    def up_to_date(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(each id of prompt and output once, how often the output has it). Valid until the next call."""
        for token in self._output_ids[self._num_counted :]:
            place = self._place_of(token)  # may make room, and so another array
            self._counts[place] += 1.0
        self._num_counted = len(self._output_ids)
        size = len(self._place)
        return self._ids[:size], self._counts[:size]

    def _place_of(self, token: int) -> int:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place >= len(self._ids):
                room = max(_MORE_IDS, place)
                self._ids = np.concatenate((self._ids, np.zeros(room, dtype=np.int64)))
                self._counts = np.concatenate((self._counts, np.zeros(room, dtype=np.float32)))
            self._ids[place] = token
        return place
