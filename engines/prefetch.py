"""Sequences whose prefix lies on disk wait for it, a moment at most, before they are scheduled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engines.sequence import Sequence

if TYPE_CHECKING:
    from kvstore.blocks import PrefixCache
    from kvstore.clock import Clock
    from kvstore.tiers import TieredStore

WAIT_S = 0.5  # a disk slower than this is no help against computing
LOOK_S = 0.002


class PrefixPrefetch:
    """Owned by the engine thread. Without a cache or tiers nobody ever waits."""

    def __init__(self, cache: PrefixCache | None, tiers: TieredStore | None, clock: Clock) -> None:
        self._cache = cache
        self._tiers = tiers
        self._clock = clock
        self._parked: dict[tuple[str, int], tuple[Sequence, frozenset[bytes], float]] = {}

    def parks(self, sequence: Sequence) -> bool:
        """True if it has to wait; `due` gives it back."""
        if self._cache is None or self._tiers is None or sequence.block_table or sequence.wants_prompt_scores:
            return False
        self._tiers.poll()
        keys = self._cache.prefetch(sequence.token_slice(0, sequence.num_tokens), salt=sequence.tenant)
        if keys:
            self._parked[sequence.seq_id] = (sequence, keys, self._clock() + WAIT_S)
        return bool(keys)

    def forget(self, seq_id: tuple[str, int]) -> None:
        """It ended while it waited. Safe to repeat."""
        self._parked.pop(seq_id, None)

    def due(self) -> list[Sequence]:
        """Those whose blocks have come, or have taken too long, in the order they came."""
        if self._tiers is None:
            return []
        self._tiers.poll()
        now = self._clock()
        due = [
            seq_id
            for seq_id, (_, keys, until_s) in self._parked.items()
            if now >= until_s or not self._tiers.is_pending(keys)
        ]
        return [self._parked.pop(seq_id)[0] for seq_id in due]

    def next_wakeup_s(self) -> float | None:
        """When to call `due` again, or None while nobody waits."""
        return self._clock() + LOOK_S if self._parked else None
