"""The order of remedies when blocks run out. Pure.

1. SWAP     host memory has room for all choices of the request, and the copies cost less than computing it again
2. MOVE     another decode worker may have room: one choice, an ownership to pass on, not moved too often yet
3. RELEASE  back to the queue; whoever claims it reserves all it can ever need, so it is not taken a second time

Each counts as one preemption. The count goes with the sequence to another worker; after a release it is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from enum import StrEnum
from typing import Final

from engines.sequence import Sequence
from engines.swap.costs import SwapCosts
from engines.swap.swapped import SwappedRequests

MAX_PREEMPTIONS: Final = 2  # then a sequence is pinned: it is only taken when nobody else can be


class Remedy(StrEnum):
    SWAP = "swap"
    MOVE = "move"
    RELEASE = "release"


class Ladder:
    """Owned by the engine thread; the decode scheduler asks it.

    Attributes:
        has_peers: other decode workers are known. Told by the engine.
        moving: requests on their way to one. Their blocks come back soon, so nobody else is taken meanwhile.
    """

    def __init__(self, swapped: SwappedRequests, costs: SwapCosts | None = None) -> None:
        self.swapped = swapped
        self.costs = costs or SwapCosts()
        self.has_peers = False
        self.moving: set[str] = set()

    def choose(self, choices: Items[Sequence]) -> Remedy:
        """The first remedy that can be had for a request, given all its running choices."""
        num_pages = self.swapped.num_pages_for(choices)
        num_tokens = sum(sequence.num_computed_tokens for sequence in choices)
        if num_pages <= self.swapped.num_free_pages and self.costs.is_swap_cheaper(num_pages, num_tokens):
            return Remedy.SWAP
        if self.has_peers and len(choices) == 1 and _may_move(choices[0]):
            return Remedy.MOVE
        return Remedy.RELEASE


def _may_move(sequence: Sequence) -> bool:
    has_kv_of_all = sequence.num_uncomputed_tokens == 1 and bool(sequence.output_token_ids)
    return has_kv_of_all and sequence.owner is not None and sequence.num_preemptions < MAX_PREEMPTIONS
