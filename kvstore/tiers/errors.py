"""Errors of the tiers."""

from __future__ import annotations

from kvstore.errors import KVStoreError


class TierError(KVStoreError):
    """A tier cannot be used at all; what goes wrong with a single block is only a miss.

    Attributes:
        what: what was found.
        expected: what is needed.
    """

    def __init__(self, *, what: str, expected: str) -> None:
        super().__init__(f"KV tier: {what}; expected {expected}")
        self.what = what
        self.expected = expected
