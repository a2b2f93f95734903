"""The sending side: blocks of the prefix cache are pushed to a peer's cache, a few at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Final

import msgspec

from engines.prefix_share.keeper import PREFIX_RID, PrefixState
from kvstore import transport as kv

if TYPE_CHECKING:
    from kvstore.address import KVAddress
    from kvstore.blocks import BlockPool, PrefixCache

MAX_PUSHES: Final = 4  # at once: a hand-over of a request must not wait behind many of these
LIMIT_S: Final = 5.0

Done = Callable[[bool], None]  # told whether the peer has them


@dataclass(slots=True, eq=False)
class _Push:
    blocks: list[int]
    keys: list[bytes]
    first: int
    done: Done


class PrefixSender:
    """Owned by the engine thread. Holds a reference on what it pushes until the `kv` thread reads it no more."""

    def __init__(
        self, *, node: kv.KVPort, pool: BlockPool, cache: PrefixCache, incarnation: str, block_size: int
    ) -> None:
        self._kv = node
        self._pool = pool
        self._cache = cache
        self._block_size = block_size
        self._names = (f"{incarnation}.prefix.{n}" for n in count(1))
        self._pushes: dict[str, _Push] = {}
        self.num_blocks = 0  # that peers have taken so far
        self.num_dropped = 0  # pushes that did not happen: too many at once, or the peer had no room

    def send(self, target: KVAddress, keys: Sequence[bytes], first: int, done: Done = lambda _: None) -> bool:
        """Push what is cached of `keys[first:]`. False, `done` is not told: nothing is, or too much is under way."""
        if len(self._pushes) >= MAX_PUSHES:
            self.num_dropped += 1
            return False
        blocks = self._cache.hold(keys, first)
        if not blocks:
            return False
        xfer = next(self._names)
        self._pushes[xfer] = _Push(blocks, list(keys[first : first + len(blocks)]), first, done)
        self._kv.reserve(
            target, xfer, rid=PREFIX_RID, epoch=0, token=PREFIX_RID, num_blocks=len(blocks), deadline_s=LIMIT_S
        )
        return True

    def owns(self, xfer: str) -> bool:
        return xfer in self._pushes

    def on_event(self, event: kv.Event) -> None:
        """An event of a push that is ours."""
        push = self._pushes[event.xfer]
        match event:
            case kv.GrantReceived(xfer):
                self._kv.push(xfer, [(block, place) for place, block in enumerate(push.blocks)], 0, self._kv.num_layers)
                num_tokens = len(push.blocks) * self._block_size
                state = msgspec.msgpack.encode(PrefixState(push.keys, push.first, self._block_size))
                self._kv.commit(xfer, src_blocks=push.blocks, num_tokens=num_tokens, state=state)
            case kv.Handed():
                self.num_blocks += len(push.blocks)
                self._end(event.xfer, push, is_taken=True)
            case kv.GrantRefused() | kv.PushFailed() | kv.Refused() | kv.SourceFree():
                self.num_dropped += 1
                self._end(event.xfer, push, is_taken=False)

    def _end(self, xfer: str, push: _Push, *, is_taken: bool) -> None:
        del self._pushes[xfer]
        self._pool.free(push.blocks)
        push.done(is_taken)
