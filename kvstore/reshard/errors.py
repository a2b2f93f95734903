"""What can go wrong between two layouts.

ValueError
└── Inconvertible     KV of one worker cannot be made into KV of the other: refused by name when the two meet
"""

from __future__ import annotations


class Inconvertible(ValueError):
    """`name` is the fact that differs; `source` and `destination` are the values of both sides."""

    def __init__(self, *, name: str, source: object, destination: object) -> None:
        super().__init__(f"{name}: writer has {source}, receiver has {destination}")
        self.name = name
        self.source = source
        self.destination = destination
