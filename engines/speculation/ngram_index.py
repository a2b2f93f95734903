"""Where the last few tokens of a sequence occurred before, and what followed there.

After prompt look-up decoding (Saxena, 2023). Each token is indexed once, when it comes; a look-up walks over at most
`MAX_CANDIDATES` former places, so that neither grows with the square of the length.

    ids   [ a b c d . . . . . . a b c ]        last min_size ids: (b, c); indexed at the place of d
              ^^^ ^place            ^^^        the match is 3 long, the guess is "d ..."
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

MAX_CANDIDATES: Final = 16


class NgramIndex:
    """Of one sequence. Owned by the engine thread.

    Args:
        min_size: ids that a former place must have in common with the end.
        max_size: a match of this length is taken without looking for a longer one.
    """

    def __init__(self, *, min_size: int, max_size: int) -> None:
        self._min_size = min_size
        self._max_size = max_size
        self._ids: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # min_size ids -> place of what followed them last
        self._earlier: list[int] = []  # place -> the place before it that followed the same ids, or -1

    def follow(self, prompt_ids: Sequence[int], output_ids: Sequence[int]) -> None:
        """Take in what is new of a sequence, whose ids only ever grow."""
        num_known, num_prompt = len(self._ids), len(prompt_ids)
        if num_known < num_prompt:
            self._extend(prompt_ids)
            num_known = num_prompt
        self._extend(output_ids[num_known - num_prompt :])

    def propose(self, num_tokens: int) -> list[int]:
        """What followed the longest match, the latest of equally long ones; empty if there is none.

        A match that overlaps the end is copied on and on, as in LZ77: the guess goes on with itself.
        """
        place = self._best_place()
        if place < 0:
            return []
        found = self._ids[place : place + num_tokens]
        period = len(self._ids) - place
        while len(found) < num_tokens:
            found.append(found[-period])
        return found

    def _extend(self, new_ids: Sequence[int]) -> None:
        ids, size = self._ids, self._min_size
        for token_id in new_ids:
            place = len(ids)
            earlier = -1
            if place >= size:
                key = tuple(ids[-size:])
                earlier = self._latest.get(key, -1)
                self._latest[key] = place
            self._earlier.append(earlier)
            ids.append(token_id)

    def _best_place(self) -> int:
        best, best_size = -1, 0
        place = self._latest.get(tuple(self._ids[-self._min_size :]), -1)
        for _ in range(MAX_CANDIDATES):
            if place < 0 or best_size >= self._max_size:
                break
            size = self._match_size(place)
            if size > best_size:
                best, best_size = place, size
            place = self._earlier[place]
        return best

    def _match_size(self, place: int) -> int:
        """Ids before `place` that equal the last ones, counted up to `max_size`; `min_size` of them do."""
        ids, size = self._ids, self._min_size
        while size < self._max_size and size < place and ids[place - 1 - size] == ids[-1 - size]:
            size += 1
        return size
