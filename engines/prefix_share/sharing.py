"""The parts of prefix sharing, wired for one engine: who takes which event, what the front is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engines.messages import Add, EngineMessage, Kept, Target
from engines.prefix_share.fetch import PrefixFetch
from engines.prefix_share.keeper import PREFIX_RID, PrefixKeeper
from engines.prefix_share.sender import PrefixSender
from engines.prefix_share.write_back import WriteBack
from engines.sequence import Sequence
from kvstore import transport as kv
from kvstore.blocks.prefix_keys import block_keys

if TYPE_CHECKING:
    from kvstore.blocks import BlockPool, PrefixCache
    from kvstore.clock import Clock


class NoSharing:
    """Where there is no prefix cache, or `kv.share_prefixes` is off: nothing is kept, asked for or waited for."""

    def __init__(self, node: kv.KVPort) -> None:
        self._kv = node

    def meet(self, caches: list[Target]) -> None:
        """The workers that keep prefixes, without this one."""

    def added(self, add: Add) -> None:
        """A request came; somebody may keep a prefix of it."""

    def takes(self, event: kv.Event) -> bool:
        """True if the event was about a prefix; then it is dealt with."""
        match event:
            case kv.FetchRequested():
                self._kv.decline(event)
            case kv.ReserveRequested(rid=rid) if rid == PREFIX_RID:
                self._kv.grant(event, None, reason="no_space")
            case _:
                return isinstance(event, kv.FetchDeclined)
        return True

    def parks(self, sequence: Sequence) -> bool:  # noqa: ARG002
        """True if it waits for a prefix; `due` gives it back."""
        return False

    def due(self) -> list[Sequence]:
        """Those that wait no more."""
        return []

    def forget(self, seq_id: tuple[str, int]) -> None:
        """A sequence left. Safe to repeat."""

    def promoted(self, xfer: str, sequences: list[Sequence]) -> None:
        """A request was handed over to this worker by the transfer `xfer`."""

    def computed(self, sequence: Sequence) -> None:
        """A prompt was computed here, and is cached: others may want it."""

    def advanced(self, sequence: Sequence) -> None:
        """A sequence that is decoded here has one token more."""

    def ended(self, sequence: Sequence) -> None:
        """It is finished here; its blocks are still its own."""

    def next_wakeup_s(self) -> float | None:
        """When `due` has something that no event brings."""
        return None

    def counters(self) -> dict[str, float]:
        return {}


class PrefixSharing(NoSharing):
    """Owned by the engine thread. Made only where there is a prefix cache.

    Args:
        keeps: this worker keeps prefixes for others (prefill), and says what it has; else it writes back (decode).
    """

    def __init__(
        self,
        *,
        node: kv.KVPort,
        pool: BlockPool,
        cache: PrefixCache,
        incarnation: str,
        host_id: str,
        block_size: int,
        keeps: bool,
        send: Callable[[EngineMessage], None],
        clock: Clock,
    ) -> None:
        super().__init__(node)
        self._block_size = block_size
        self._keeps = keeps
        self._say = send
        self._num_peers = 0
        self._keeper = PrefixKeeper(node=node, pool=pool, cache=cache, block_size=block_size)
        self._sender = PrefixSender(node=node, pool=pool, cache=cache, incarnation=incarnation, block_size=block_size)
        self._fetch = PrefixFetch(node=node, cache=cache, block_size=block_size, incarnation=incarnation, clock=clock)
        self._write_back = WriteBack(sender=self._sender, cache=cache, block_size=block_size, host_id=host_id)

    def meet(self, caches: list[Target]) -> None:
        self._num_peers = len(caches)
        if not self._keeps:
            self._write_back.set_targets(caches)

    def added(self, add: Add) -> None:
        self._fetch.hint(add.rid, add.prefix)

    def takes(self, event: kv.Event) -> bool:
        match event:
            case kv.ReserveRequested(rid=rid) if rid == PREFIX_RID:
                self._keeper.on_reserve(event)
            case kv.Arrived(rid=rid) if rid == PREFIX_RID:
                state = self._keeper.on_arrived(event)
                if state is not None:
                    self._fetch.came(state.keys)
                    self._tell(state.keys, state.first)
            case kv.FetchRequested():
                if not self._sender.send(event.address, event.keys, event.first):
                    self._kv.decline(event)
            case kv.FetchDeclined(name):
                self._fetch.declined(name)
            case _ if self._sender.owns(event.xfer):
                self._sender.on_event(event)
            case _:
                return False
        return True

    def parks(self, sequence: Sequence) -> bool:
        return self._fetch.parks(sequence)

    def due(self) -> list[Sequence]:
        return self._fetch.due()

    def forget(self, seq_id: tuple[str, int]) -> None:
        self._fetch.forget(seq_id)
        self._write_back.forget(seq_id)

    def promoted(self, xfer: str, sequences: list[Sequence]) -> None:
        source, _, _ = xfer.rpartition(":")
        for sequence in sequences[:1]:
            self._write_back.arrived(sequence.rid, source, len(sequence.prompt_token_ids))

    def advanced(self, sequence: Sequence) -> None:
        self._write_back.advanced(sequence)

    def ended(self, sequence: Sequence) -> None:
        self._write_back.ended(sequence)

    def next_wakeup_s(self) -> float | None:
        return self._fetch.next_wakeup_s()

    def computed(self, sequence: Sequence) -> None:
        if self._keeps and self._num_peers:
            num_blocks = sequence.num_computed_tokens // self._block_size
            ids = sequence.token_slice(0, num_blocks * self._block_size)
            self._tell(list(block_keys(ids, num_blocks, self._block_size, salt=sequence.tenant)), 0)

    def counters(self) -> dict[str, float]:
        fetch = self._fetch
        return {
            "prefix_sent_blocks": float(self._sender.num_blocks),
            "prefix_send_dropped": float(self._sender.num_dropped),
            "prefix_kept_blocks": float(self._keeper.num_blocks),
            "prefix_fetches": float(fetch.num_asked),
            "prefix_fetches_declined": float(fetch.num_declined),
            "prefix_fetches_late": float(fetch.num_late),
        }

    def _tell(self, keys: list[bytes], first: int) -> None:
        """The last of them is where the next turn begins; at a power of two two different prompts may meet."""
        if not self._keeps or not keys:
            return
        marks = [(key, first + index) for index, key in enumerate(keys, 1)]
        self._say(Kept([mark for mark in marks if mark[1] & (mark[1] - 1) == 0 or mark is marks[-1]]))
