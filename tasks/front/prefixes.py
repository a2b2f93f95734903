"""Prefixes that workers keep: this one's are registered, and for a prompt the longest that a peer keeps is looked up.

Output thread. All of it is a hint: without an answer of the state server the prompt is computed; nothing is repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from engines.messages import Kept, PrefixHint
from kvstore.blocks.prefix_keys import block_keys
from kvstore.errors import KVStoreError
from kvstore.state.handles import TTL_S, PrefixHandle, handle_name
from tasks.front.context import FrontContext

log = logging.getLogger(__name__)

MIN_BLOCKS: Final = 4  # shorter prompts are computed faster than they are looked up
MAX_LOOKUPS: Final = 64
MAX_WAITING: Final = 4096  # handles, until the next beat


class Prefixes:
    """See the module. `secrets`: of the cluster, the current one first."""

    def __init__(self, ctx: FrontContext, secrets: Callable[[], Sequence[bytes]]) -> None:
        self._ctx = ctx
        self._secrets = secrets
        self._waiting: dict[str, PrefixHandle] = {}
        self.num_keepers = 0  # other workers that keep prefixes

    def on_kept(self, message: Kept) -> None:
        """Goes out with the next beat."""
        ready = self._ctx.ready
        if ready is None or len(self._waiting) + len(message.marks) > MAX_WAITING:
            return
        for key, num_blocks in message.marks:
            name = handle_name(ready.address.compat, key)
            self._waiting[name] = PrefixHandle(
                name=name,
                num_blocks=num_blocks,
                num_tokens=num_blocks * ready.block_size,
                address=ready.address,
                expires_s=time.time() + TTL_S,
            )

    def register(self) -> None:
        """File what was kept since the last beat."""
        handles, self._waiting = list(self._waiting.values()), {}
        if handles:
            self._ctx.store.put_handles(handles, self._secrets()[0])

    def is_wanted(self, num_tokens: int) -> bool:
        """Whether `find` may help a prompt of that length here."""
        ready = self._ctx.ready
        return ready is not None and self.num_keepers > 0 and num_tokens > MIN_BLOCKS * ready.block_size

    def find(self, token_ids: Sequence[int], tenant: str) -> PrefixHint | None:
        """The longest prefix of these tokens that a peer keeps, at the ends that keepers register."""
        ctx, ready = self._ctx, self._ctx.ready
        if ready is None:
            return None
        num_blocks = (len(token_ids) - 1) // ready.block_size
        keys = list(block_keys(token_ids, num_blocks, ready.block_size, salt=tenant))
        names = [handle_name(ready.address.compat, keys[count - 1]) for count in lookup_ends(num_blocks)]
        try:
            handle = ctx.store.find_handle(names, self._secrets(), time.time())
        except KVStoreError as error:
            log.debug("no prefix was looked up: %s", error)
            return None
        if handle is None or handle.address.incarnation == ready.address.incarnation:
            return None
        return PrefixHint(handle.address, handle.num_blocks)


def lookup_ends(num_blocks: int) -> list[int]:
    """Lengths in blocks at which to look, longest first: all of the last ones, then the powers of two.

    >>> lookup_ends(6)
    [6, 5, 4]
    >>> lookup_ends(200)[-4:]
    [32, 16, 8, 4]
    """
    latest = range(num_blocks, max(num_blocks - MAX_LOOKUPS, MIN_BLOCKS - 1), -1)
    powers = (1 << bits for bits in range(num_blocks.bit_length(), 1, -1))
    return [*latest, *(power for power in powers if power < latest.stop + 1 and power >= MIN_BLOCKS)]
