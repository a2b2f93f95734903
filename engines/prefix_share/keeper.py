"""The receiving side: blocks of a prefix that a peer pushes here go into the prefix cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from kvstore import transport as kv
from kvstore.blocks import OutOfBlocks

if TYPE_CHECKING:
    from kvstore.blocks import BlockPool, PrefixCache

PREFIX_RID: Final = "prefix"  # no request is called so: their ids name a shard
SPARE_SHARE: Final = 4  # one block in so many stays free for grants and growth


class PrefixState(msgspec.Struct, frozen=True, array_like=True):
    """What a push of prefix blocks carries: their hashes, in order, how many come before them in their chain, and the
    tokens of one: the hashes of other blocks would name other tokens.
    """

    keys: list[bytes]
    first: int
    block_size: int


_decode = msgspec.msgpack.Decoder(PrefixState).decode


class PrefixKeeper:
    """Owned by the engine thread. Takes the events of transfers under `PREFIX_RID` at this receiver."""

    def __init__(self, *, node: kv.KVPort, pool: BlockPool, cache: PrefixCache, block_size: int) -> None:
        self._block_size = block_size
        self._kv = node
        self._pool = pool
        self._cache = cache
        self.num_blocks = 0  # taken so far

    def on_reserve(self, event: kv.ReserveRequested) -> None:
        """Blocks that neither a grant nor growth is likely to need soon; else a refusal, and the peer asks no more."""
        blocks: list[int] | None = None
        if self._pool.num_free - event.num_blocks >= self._pool.num_blocks // SPARE_SHARE:
            try:
                blocks = self._pool.allocate(event.num_blocks)
            except OutOfBlocks:
                blocks = None
        self._kv.grant(event, blocks, reason="" if blocks else "no_space")

    def on_arrived(self, event: kv.Arrived) -> PrefixState | None:
        """Verified blocks become findable, and free to be evicted. None: the state made no sense; nothing is kept."""
        try:
            state = _decode(event.state)
        except msgspec.MsgspecError:
            state = None
        if state is None or not self._is_sound(state, event):
            self._kv.settle(event.xfer, False)
            return None
        self._cache.adopt(state.keys, event.blocks)
        self._kv.settle(event.xfer, True)
        self._pool.free(list(event.blocks))
        self.num_blocks += len(state.keys)
        return state

    def _is_sound(self, state: PrefixState, event: kv.Arrived) -> bool:
        num_tokens = len(state.keys) * self._block_size
        fits = state.block_size == self._block_size and num_tokens == event.num_tokens
        return fits and len(state.keys) <= len(event.blocks) and all(len(key) == 16 for key in state.keys)
