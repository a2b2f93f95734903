"""Prefill workers ask whoever keeps a longer prefix for it, and wait a moment before they compute it themselves."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Final

from engines.messages import PrefixHint
from engines.sequence import Sequence
from kvstore import transport as kv
from kvstore.blocks.prefix_keys import block_keys

if TYPE_CHECKING:
    from kvstore.blocks import PrefixCache
    from kvstore.clock import Clock

MIN_GAIN_BLOCKS: Final = 2  # fewer are computed as fast as they are asked for
WAIT_S: Final = 0.5


@dataclass(slots=True, eq=False)
class _Waiting:
    sequence: Sequence
    last_key: bytes
    until_s: float
    is_over: bool = False


class PrefixFetch:
    """Owned by the engine thread."""

    def __init__(self, *, node: kv.KVPort, cache: PrefixCache, block_size: int, incarnation: str, clock: Clock) -> None:
        self._kv = node
        self._cache = cache
        self._block_size = block_size
        self._clock = clock
        self._names = (f"{kv.FETCH_PREFIX}{incarnation}.{n}" for n in count(1))
        self._hints: dict[str, PrefixHint] = {}
        self._waiting: dict[str, _Waiting] = {}  # by the name of the fetch
        self.num_asked = 0
        self.num_declined = 0
        self.num_late = 0

    def hint(self, rid: str, hint: PrefixHint | None) -> None:
        """Somebody keeps a prefix of this request."""
        if hint is not None:
            self._hints[rid] = hint

    def parks(self, sequence: Sequence) -> bool:
        """True if it waits for a prefix; `due` gives it back."""
        hint = self._hints.pop(sequence.rid, None)
        if hint is None or sequence.block_table or sequence.wants_prompt_scores:
            return False
        ids = sequence.token_slice(0, sequence.num_tokens)
        # The last token is always computed, and a hint is a hint: it may name more than there are.
        num_blocks = min(hint.num_blocks, (len(ids) - 1) // self._block_size)
        keys = list(block_keys(ids, num_blocks, self._block_size, salt=sequence.tenant))
        num_here = self._cache.count(keys)
        if num_blocks - num_here < MIN_GAIN_BLOCKS:
            return False
        name = next(self._names)
        self.num_asked += 1
        self._waiting[name] = _Waiting(sequence, keys[-1], self._clock() + WAIT_S)
        self._kv.fetch(hint.address, name, keys, first=num_here)
        return True

    def came(self, keys: list[bytes]) -> None:
        """Blocks have arrived: whoever waited for the last of them goes on."""
        for waiting in self._waiting.values():
            waiting.is_over = waiting.is_over or waiting.last_key in keys

    def declined(self, name: str) -> None:
        waiting = self._waiting.get(name)
        if waiting is not None:
            self.num_declined += 1
            waiting.is_over = True

    def forget(self, seq_id: tuple[str, int]) -> None:
        """It ended while it waited. Safe to repeat."""
        self._hints.pop(seq_id[0], None)
        self._waiting = {name: w for name, w in self._waiting.items() if w.sequence.seq_id != seq_id}

    def due(self) -> list[Sequence]:
        """Those whose prefix has come, or does not, in the order they asked."""
        now, due = self._clock(), []
        for name, waiting in list(self._waiting.items()):
            if waiting.is_over or now >= waiting.until_s:
                self.num_late += not waiting.is_over
                del self._waiting[name]
                due.append(waiting.sequence)
        return due

    def next_wakeup_s(self) -> float | None:
        return min((0.0 if w.is_over else w.until_s for w in self._waiting.values()), default=None)
