"""Decode workers give full blocks to a prefill worker's cache: the next turn finds them, and so does a recovery."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import xxhash

from engines.messages import Target
from engines.prefix_share.sender import PrefixSender
from engines.sequence import Sequence
from kvstore.blocks.prefix_keys import block_keys

if TYPE_CHECKING:
    from kvstore.blocks import PrefixCache

CHECKPOINT_BLOCKS: Final = 4  # a sequence that goes on is written back each time so many blocks have filled


@dataclass(slots=True)
class _Kept:
    """How far a sequence is written back, and where."""

    incarnation: str
    num_blocks: int
    is_busy: bool = False


class WriteBack:
    """Owned by the engine thread.

    Args:
        host_id: of this worker; a cache on another host outlives ours.
    """

    def __init__(self, *, sender: PrefixSender, cache: PrefixCache, block_size: int, host_id: str) -> None:
        self._sender = sender
        self._cache = cache
        self._block_size = block_size
        self._host_id = host_id
        self._targets: list[Target] = []
        self._kept: dict[tuple[str, int], _Kept] = {}
        self._sources: dict[str, tuple[str, int]] = {}  # rid -> (who computed its prompt, its full blocks there)

    def set_targets(self, targets: list[Target]) -> None:
        """The caches there are."""
        self._targets = targets

    def arrived(self, rid: str, source: str, num_tokens: int) -> None:
        """`source` handed a request over, and has its first `num_tokens` tokens in its cache."""
        self._sources[rid] = (source, num_tokens // self._block_size)

    def advanced(self, sequence: Sequence) -> None:
        """It has one token more. Cheap, unless enough blocks have filled."""
        if not self._targets or sequence.num_computed_tokens % self._block_size:
            return
        kept = self._kept.get(sequence.seq_id)
        num_kept = kept.num_blocks if kept is not None else self._sources.get(sequence.rid, ("", 0))[1]
        if sequence.num_computed_tokens // self._block_size - num_kept >= CHECKPOINT_BLOCKS:
            self._write(sequence)

    def ended(self, sequence: Sequence) -> None:
        """It is finished here; its blocks are still its own."""
        if self._targets:
            self._write(sequence)
        self.forget(sequence.seq_id)

    def forget(self, seq_id: tuple[str, int]) -> None:
        """It left. Safe to repeat."""
        self._kept.pop(seq_id, None)
        if not any(other[0] == seq_id[0] for other in self._kept):
            self._sources.pop(seq_id[0], None)

    def _write(self, sequence: Sequence) -> None:
        num_blocks = sequence.num_computed_tokens // self._block_size
        kept = self._kept.get(sequence.seq_id)
        if kept is None:
            kept = self._kept[sequence.seq_id] = self._begin(sequence.rid)
        target = next((t for t in self._targets if t.address.incarnation == kept.incarnation), None)
        if target is None:  # that worker is gone: begin again elsewhere
            kept = self._kept[sequence.seq_id] = self._begin(sequence.rid)
            target = next(t for t in self._targets if t.address.incarnation == kept.incarnation)
        if kept.is_busy or num_blocks <= kept.num_blocks:
            return
        ids = sequence.token_slice(0, num_blocks * self._block_size)
        self._cache.insert(ids, sequence.block_table, salt=sequence.tenant)
        keys = list(block_keys(ids, num_blocks, self._block_size, salt=sequence.tenant))
        kept.is_busy = self._sender.send(
            target.address, keys, kept.num_blocks, partial(self._written, kept, num_blocks)
        )

    @staticmethod
    def _written(kept: _Kept, num_blocks: int, is_taken: bool) -> None:
        kept.is_busy = False
        if is_taken:
            kept.num_blocks = num_blocks

    def _begin(self, rid: str) -> _Kept:
        source, num_blocks = self._sources.get(rid, ("", 0))
        target = choose_cache(self._targets, rid=rid, own_host=self._host_id, source=source)
        incarnation = target.address.incarnation
        return _Kept(incarnation, num_blocks if incarnation == source else 0)


def choose_cache(targets: Items[Target], *, rid: str, own_host: str, source: str) -> Target:
    """Where a request is written back: another host if there is one, whoever has its prompt if it is there, else always
    the same one for a request and evenly over all (rendezvous hashing, Thaler and Ravishankar 1998).
    """
    elsewhere = [target for target in targets if target.address.host_id != own_host] or list(targets)
    for target in elsewhere:
        if target.address.incarnation == source:
            return target
    return max(elsewhere, key=lambda target: xxhash.xxh3_64_intdigest(f"{rid} {target.address.incarnation}".encode()))
