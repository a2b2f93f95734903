"""The worker in the registry: its beat each 0.5 s, and the beats of the others. Routing only, never a proof."""

from __future__ import annotations

import logging
import os

from configs import SecretError
from kvstore.errors import KVStoreError, StateUnavailable
from kvstore.state.records import WorkerBeat
from tasks.front.context import FrontContext
from tasks.front.peers import PeerTable
from tasks.front.prefixes import Prefixes
from tasks.front.spans import PhaseSpans

log = logging.getLogger(__name__)

BEAT_EVERY_S = 0.5


class Registry:
    """Output thread. A beat is one call, the server's time another; who pushes reads the others' beats in a third."""

    def __init__(self, ctx: FrontContext, peers: PeerTable, prefixes: Prefixes, spans: PhaseSpans) -> None:
        self._ctx = ctx
        self._peers = peers
        self._prefixes = prefixes
        self._spans = spans
        self._due_s = ctx.clock()

    def next_s(self) -> float:
        return self._due_s

    def beat_soon(self) -> None:
        """Something that others route by has changed."""
        self._due_s = self._ctx.clock()

    def turn(self, *, free_hands: int, num_waiting: int) -> None:
        ctx = self._ctx
        if ctx.clock() < self._due_s:
            return
        self._due_s = ctx.clock() + BEAT_EVERY_S
        if ctx.ready is None:
            return
        try:
            ctx.store.heartbeat(self._beat(free_hands=free_hands, num_waiting=num_waiting))
            if ctx.options.role != "both":
                self._refresh_peers()
            self._prefixes.register()
            self._spans.probe()
        except StateUnavailable:
            return  # the next beat is half a second away
        except (KVStoreError, SecretError) as error:
            log.warning("no beat: %s", error)

    def _refresh_peers(self) -> None:
        stats = self._ctx.stats
        self._peers.refresh(self._ctx.store.workers(), () if stats is None else stats.links)
        self._prefixes.num_keepers = len(self._peers.caches)
        if self._peers.take_order_if_new():
            self._ctx.link.send(self._peers.message())

    def leave(self, incarnation: str) -> None:
        """Out of the registry at once; a failure only leaves it there for 2 s."""
        ctx = self._ctx
        try:
            ctx.store.retire(incarnation)
        except KVStoreError as error:
            log.warning("%s stays in the registry until its lease ends: %s", incarnation, error)

    def _beat(self, *, free_hands: int, num_waiting: int) -> WorkerBeat:
        ctx, ready, stats = self._ctx, self._ctx.ready, self._ctx.stats
        assert ready is not None
        settings = ctx.settings
        is_prefill = ctx.options.role == "prefill"
        blocks = {} if stats is None else stats.blocks
        return WorkerBeat(
            incarnation=ctx.identity.incarnation,
            node=ctx.options.node,
            role=ctx.options.role,
            model=ctx.model,
            address=ready.address,
            compat=ready.address.compat,
            dtype=ready.dtype,
            repeatability=ready.repeatability,
            num_blocks=ready.num_blocks,
            free_blocks=blocks.get("free", ready.num_blocks),
            live=sum(len(request.choices) for request in ctx.live.values()),
            max_num_seqs=settings.prefill.max_batch_size if is_prefill else settings.decode.max_num_seqs,
            waiting=num_waiting + (0 if stats is None else stats.waiting),
            free_hands=free_hands,
            step_ms=0.0 if stats is None else stats.step_ms,
            draining=ctx.is_draining,
            pid=os.getpid(),
            engine_pids=[ready.pid],
            host_id=ready.address.host_id,
            blocks=blocks,
            counters={} if stats is None else stats.counters,
            overdue_writers=[] if stats is None else stats.overdue_writers,
        )
