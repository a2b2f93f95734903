"""Wake-ups: the Celery messages that tell a worker to look at a request. Used by gateway, reaper, supervisor, worker.

A message only carries a request id. Lost ones are sent again by the reaper, doubled ones meet BUSY, so sending is best
effort: an error is logged, never raised.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from celery import Celery
from kombu.exceptions import OperationalError

from configs.schema import Settings
from kvstore.clock import Clock, now_s
from kvstore.errors import KVStoreError
from kvstore.state.records import WorkerBeat
from kvstore.state.replies import Turn
from tasks.conf import configure
from tasks.names import TASK_OF_STAGE, decode_stage, generate_queue, prefill_queue, task_id

if TYPE_CHECKING:
    from kvstore.state.store import StateStore

log = logging.getLogger(__name__)

BEATS_MAX_AGE_S = 0.5
GRACE_S = 5.0  # the functions enforce deadlines; Celery's time limit is only a backstop behind them
# A pooled connection may have died with a former broker: one more try, on a new one, at once.
RETRY_ONCE: dict[str, Any] = {
    "retry": True,
    "retry_policy": {"max_retries": 1, "interval_start": 0, "interval_step": 0.05, "interval_max": 0.1},
}
REVOKED_STAGES = ("prefill", "generate", decode_stage(1), decode_stage(2))


def stage_for(beats: Iterable[WorkerBeat], model: str) -> str:
    """`prefill` if prompts can be computed and handed over, `generate` if only workers that keep them are there."""
    roles = {beat.role for beat in beats if beat.model == model and not beat.draining}
    if {"prefill", "decode"} <= roles or "both" not in roles:
        return "prefill"
    return "generate"


class WakeupSender:
    """Sends and revokes wake-ups. Thread-safe: each call takes a connection of its own from Celery's pool."""

    def __init__(self, settings: Settings, *, app: Celery | None = None, clock: Clock = now_s) -> None:
        self._model = settings.model.name
        self._time_limit_s = settings.gateway.default_timeout_s + GRACE_S
        self._clock = clock
        self._stage = "prefill"
        self._stage_until_s = -1.0
        if app is None:
            app = Celery("celeriac-wakeups", set_as_current=False)
            configure(app, settings)
        self._app = app
        self._errors = (OperationalError, OSError, *app.connection_for_write().connection_errors)

    def send(self, turns: Sequence[Turn], store: StateStore, *, remaining_s: float | None = None) -> None:
        """One message per turn, to whatever kind of worker is live. `remaining_s`: until the request's deadline."""
        if not turns:
            return
        stage = self._current_stage(store)
        for turn in turns:
            self.send_stage(stage, turn, remaining_s=remaining_s)

    def send_stage(self, stage: str, turn: Turn, *, remaining_s: float | None = None) -> None:
        queue = generate_queue(self._model) if stage == "generate" else prefill_queue(self._model)
        self._publish(stage, turn.rid, task_id(turn.rid, stage, turn.wake_n), queue, remaining_s)

    def send_decode(self, rid: str, wake_n: int, attempt: int, queue: str, *, remaining_s: float) -> None:
        """Tell a decode worker's queue that a sequence is on its way to it."""
        self._publish("decode", rid, task_id(rid, decode_stage(attempt), wake_n), queue, remaining_s)

    def revoke(self, ids: Sequence[str], *, terminate: bool = True) -> None:
        """Stop these tasks wherever they are. A plain revoke would leave a running one alone."""
        if not ids:
            return
        try:
            try:
                self._app.control.revoke(list(ids), terminate=terminate)
            except self._errors:  # as RETRY_ONCE
                self._app.control.revoke(list(ids), terminate=terminate)
        except self._errors as error:
            log.warning("could not revoke %d tasks: %s", len(ids), error)

    def revoke_turns(self, turns: Iterable[Turn]) -> None:
        """Stop every stage of the wake-ups `turns`."""
        self.revoke([task_id(turn.rid, stage, turn.wake_n) for turn in turns for stage in REVOKED_STAGES])

    def _current_stage(self, store: StateStore) -> str:
        now = self._clock()
        if now >= self._stage_until_s:
            try:
                self._stage = stage_for(store.workers(), self._model)
                self._stage_until_s = now + BEATS_MAX_AGE_S
            except KVStoreError as error:
                log.warning("roles of the live workers are unknown, taking %s: %s", self._stage, error)
        return self._stage

    def _publish(self, stage: str, rid: str, uuid: str, queue: str, remaining_s: float | None) -> None:
        time_limit = self._time_limit_s if remaining_s is None else remaining_s + GRACE_S
        options: dict[str, Any] = {"task_id": uuid, "queue": queue, "time_limit": time_limit}
        try:
            self._app.send_task(TASK_OF_STAGE[stage], args=[rid], ignore_result=True, **RETRY_ONCE, **options)
        except self._errors as error:
            log.warning("wake-up %s was not sent, the reaper will repeat it: %s", uuid, error)
