"""Sizes that decode graphs are recorded for: a step is padded up to the next one. Pure."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
MIN_PAGES: Final = 4
# Rows x pages x tokens of a page that a padded step may gather. Beyond it lie few long contexts beside many short ones:
# an eager step, which groups rows by length, reads less than a padded one there, and launching costs little beside it.
MAX_PADDED_TOKENS: Final = 1 << 18


def row_bucket(num_rows: int) -> int:
    """The smallest bucket that holds `num_rows`, 0 if there is none.

    >>> [row_bucket(n) for n in (1, 3, 17, 64, 257)]
    [1, 4, 24, 64, 0]
    """
    at = bisect_left(ROW_BUCKETS, num_rows)
    return ROW_BUCKETS[at] if at < len(ROW_BUCKETS) else 0


def page_bucket(num_pages: int) -> int:
    """A power of two: contexts grow, and each bucket is one more graph.

    >>> [page_bucket(n) for n in (1, 5, 8, 9)]
    [4, 8, 8, 16]
    """
    return max(MIN_PAGES, 1 << (num_pages - 1).bit_length())


def bucket_of(num_rows: int, num_pages: int, block_size: int) -> tuple[int, int] | None:
    """(rows, pages) of the graph for a step whose longest row has `num_pages`; None: the step is better off eager."""
    rows, pages = row_bucket(num_rows), page_bucket(num_pages)
    return (rows, pages) if rows and rows * pages * block_size <= MAX_PADDED_TOKENS else None
