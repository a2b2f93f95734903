"""Finds stop strings in a text that arrives in pieces, whatever the cuts between the pieces.

The stop string that is complete first wins; of two that end at the same character, the longer one. So the result
depends on the text alone, and not on how tokens cut it. Knuth-Morris-Pratt, one automaton for each stop string: the
work per character does not grow with the length of the strings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """A stop string was completed. `end` counts the characters of the fed piece up to and including its last one."""

    stop: str
    end: int


class StopMatcher:
    """State of the search through one text. Owned by one stream."""

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops` are not empty strings; the gateway has checked that."""
        # Longest first, so that of several that end at one character the longest is met first.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._failures = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)

    @property
    def num_held(self) -> int:
        """Length of the longest end of the text that may still become a stop string."""
        return max(self._matched, default=0)

    def feed(self, piece: str) -> StopMatch | None:
        """Read on. After a match the matcher is spent."""
        for offset, char in enumerate(piece):
            for k, stop in enumerate(self._stops):
                length = self._matched[k]
                while length and stop[length] != char:
                    length = self._failures[k][length - 1]
                length += stop[length] == char
                if length == len(stop):
                    return StopMatch(stop, offset + 1)
                self._matched[k] = length
        return None

    def forget(self) -> None:
        """What was read so far can no longer be part of a stop string."""
        self._matched = [0] * len(self._stops)


def _failure_table(stop: str) -> list[int]:
    """`table[i]`: length of the longest proper prefix of `stop` that is also a suffix of `stop[:i + 1]`."""
    table = [0] * len(stop)
    length = 0
    for i in range(1, len(stop)):
        while length and stop[i] != stop[length]:
            length = table[length - 1]
        length += stop[i] == stop[length]
        table[i] = length
    return table
