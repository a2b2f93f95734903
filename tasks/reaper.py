"""The reaper: takes over what its owners lost, expires, and repeats lost wake-ups. One thread per gateway process.

The state server's function decides; this thread only calls it often enough and sends what it answers.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from celery import Celery
from kombu.exceptions import OperationalError

from configs.schema import Settings
from kvstore.clock import now_s
from kvstore.errors import KVStoreError, StateUnavailable
from kvstore.outage import OutageLog
from tasks.conf import PRIORITY_STEPS, configure
from tasks.names import generate_queue, prefill_queue
from tasks.wakeups import WakeupSender

if TYPE_CHECKING:
    from kvstore.state.store import StateStore

log = logging.getLogger(__name__)

PERIOD_S = 0.5
IDLE_AFTER_S = 1.0


class IdleWatch:
    """Whether wake-ups must have been lost: for a second, at every look, no message waited and a hand was free."""

    def __init__(self) -> None:
        self._since_s: float | None = None

    def look(self, now_s: float, *, is_queue_empty: bool, has_free_hand: bool) -> bool:
        if not (is_queue_empty and has_free_hand):
            self._since_s = None
            return False
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s >= IDLE_AFTER_S


class Reaper:
    """Thread `reaper`. Start it after a fork; `stop()` returns when it has ended."""

    def __init__(self, settings: Settings, store: StateStore, sender: WakeupSender) -> None:
        self._model = settings.model.name
        self._store = store
        self._sender = sender
        self._watch = IdleWatch()
        self._queues = BrokerQueues(settings)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)
        self._queues.close()

    def _run(self) -> None:
        # Jittered, so that the gateways of a cluster do not all ask at the same moment.
        while not self._stopped.wait(PERIOD_S * random.uniform(0.8, 1.2)):
            try:
                self.reap_once()
            except StateUnavailable:
                continue  # told by the connection; nothing is lost, the next look repeats it
            except KVStoreError as error:
                log.warning("reaping failed, trying again: %s", error)
            except Exception:
                log.exception("reaping failed, trying again")

    def reap_once(self) -> None:
        """One look at every shard.

        Raises:
            KVStoreError: the state server gave no usable answer; nothing is lost, the next look repeats it.
        """
        is_idle = self._is_idle()
        for shard in range(self._store.num_shards):
            reaped = self._store.reap(shard, idle=is_idle)
            self._sender.send(reaped.turns, self._store)
            self._sender.revoke_turns(reaped.expired)

    def _is_idle(self) -> bool:
        beats = [beat for beat in self._store.workers() if beat.model == self._model and beat.role != "decode"]
        has_free_hand = any(beat.free_hands > 0 and not beat.draining for beat in beats)
        is_empty = has_free_hand and self._queues.are_empty(prefill_queue(self._model), generate_queue(self._model))
        return self._watch.look(now_s(), is_queue_empty=is_empty, has_free_hand=has_free_hand)


class BrokerQueues:
    """Lengths of Celery queues, on a connection of its own. Owned by one thread."""

    def __init__(self, settings: Settings, *, make_app: Callable[[], Celery] | None = None) -> None:
        self._app = make_app() if make_app else Celery("celeriac-queues", set_as_current=False)
        configure(self._app, settings)
        self._connection = self._app.connection_for_read()
        self._outage = OutageLog(log, "broker")

    def are_empty(self, *queues: str) -> bool:
        """False also when the broker does not answer: then nobody may conclude that a message got lost."""
        try:
            channel = self._connection.default_channel
            keys = [channel._q_for_pri(queue, priority) for queue in queues for priority in PRIORITY_STEPS]
            with channel.conn_or_acquire() as client:
                is_empty = not any(client.llen(key) for key in keys)
        except (OperationalError, OSError, *self._connection.connection_errors) as error:
            self._outage.failed("LLEN", type(error).__name__)
            self._connection.collapse()
            return False
        self._outage.answered()
        return is_empty

    def close(self) -> None:
        self._connection.release()
