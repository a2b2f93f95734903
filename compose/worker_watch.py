"""What the supervisor knows of the workers behind its processes, and what it says when one has died.

A front's incarnations come from the registry by process id. A death that `waitpid` has proven is told to the state
server at once (`evict`), so that its requests go on elsewhere without waiting for the lease.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from compose.overdue_writers import OverdueWriters
from configs.schema import Settings
from kvstore.clock import Clock
from kvstore.errors import KVStoreError, StateUnavailable
from kvstore.state.records import WorkerBeat
from kvstore.state.store import StateStore

_log = logging.getLogger(__name__)

POLL_EVERY_S = 0.5
ENGINE_END_S = 1.0


class Sender(Protocol):
    """What this calls of `tasks.wakeups.WakeupSender`."""

    def send(self, turns: object, store: StateStore) -> None: ...


@dataclass
class Seen:
    """What a process id has been to the registry so far."""

    incarnations: set[str] = field(default_factory=set)
    engine_pids: set[int] = field(default_factory=set)


class WorkerWatch:
    """Owned by the supervisor's main thread."""

    def __init__(self, settings: Settings, store: StateStore, clock: Clock) -> None:
        self._settings = settings
        self._store = store
        self._clock = clock
        self._polled_s = -POLL_EVERY_S
        self._seen: dict[int, Seen] = {}
        self._to_evict: list[str] = []
        self._sender: Sender | None = None
        self._overdue = OverdueWriters(is_engine=is_engine)
        self.beats: dict[int, WorkerBeat] = {}

    def poll(self, own_pids: Iterable[int] = ()) -> None:
        """Read the registry, at most twice a second, and repeat what a silent state server has missed.

        Args:
            own_pids: of the fronts that the supervisor started: their engines may be ended for an unanswered fence.
        """
        if self._clock() - self._polled_s < POLL_EVERY_S:
            return
        self._polled_s = self._clock()
        try:
            beats = self._store.workers()
        except KVStoreError:
            return
        self.beats = {beat.pid: beat for beat in beats}
        for beat in beats:
            seen = self._seen.setdefault(beat.pid, Seen())
            seen.incarnations.add(beat.incarnation)
            seen.engine_pids.update(beat.engine_pids)
        self._evict_due()
        self._overdue.end(beats, own_pids)

    def died(self, pid: int) -> None:
        """The front `pid` is gone, proven by waitpid. Its engine ends with it; only then nobody writes any more."""
        self._polled_s = -POLL_EVERY_S
        self.poll()  # an incarnation that is younger than the last look
        self.beats.pop(pid, None)
        seen = self._seen.pop(pid, None)
        if seen is None:
            return
        _see_out(seen.engine_pids)
        self._to_evict += sorted(seen.incarnations)
        self._evict_due()

    def _evict_due(self) -> None:
        for incarnation in list(self._to_evict):
            try:
                evicted = self._store.evict(incarnation, "exited")
                self._store.retire(incarnation)
            except StateUnavailable:
                return  # the next poll repeats it
            except KVStoreError as error:
                _log.warning("evicting %s waits: %s", incarnation, error)
                return
            self._to_evict.remove(incarnation)
            if evicted.turns:
                self._wakeups().send(evicted.turns, self._store)
            _log.warning("evicted %s: %d requests go on elsewhere", incarnation, evicted.num_requests)

    def _wakeups(self) -> Sender:
        if self._sender is None:
            from tasks.wakeups import WakeupSender  # Celery, at the first death only

            self._sender = WakeupSender(self._settings)  # type: ignore[assignment]
        assert self._sender is not None
        return self._sender


def _see_out(pids: set[int]) -> None:
    """Wait until the engines of a dead front are gone; the kernel has been told to kill them when it died."""
    end_s = time.monotonic() + ENGINE_END_S
    while alive := [pid for pid in pids if is_engine(pid)]:
        if time.monotonic() >= end_s:
            for pid in alive:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.005)


def is_engine(pid: int) -> bool:
    """Whether `pid` is an engine process that still runs (and not another that has taken over the number)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return stat.rsplit(") ", 1)[-1][:1] != "Z" and b"engines.engine_main" in command
