"""One process of the cluster: started, watched and ended by the supervisor.

PLANNED -> STARTING -> READY -> STOPPED
   ^          |          |
   +- WAITING <- died ---+          WAITING: until the back-off is over
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Final

from compose.backoff import Backoff
from compose.layout import PACKAGE_ROOT, ChildSpec
from kvstore.clock import Clock

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)  # loaded here: nothing may be imported between fork and exec


class ChildState(StrEnum):
    PLANNED = "planned"
    STARTING = "starting"
    READY = "ready"
    WAITING = "waiting"
    STOPPED = "stopped"


class ChildEvent(StrEnum):
    SPAWNED = "spawned"
    BECAME_READY = "became_ready"
    DIED = "died"
    ENDED = "ended"


TRANSITIONS: Final[Mapping[ChildState, Mapping[ChildEvent, ChildState]]] = {
    ChildState.PLANNED: {ChildEvent.SPAWNED: ChildState.STARTING, ChildEvent.ENDED: ChildState.STOPPED},
    ChildState.STARTING: {
        ChildEvent.BECAME_READY: ChildState.READY,
        ChildEvent.DIED: ChildState.WAITING,
        ChildEvent.ENDED: ChildState.STOPPED,
    },
    ChildState.READY: {ChildEvent.DIED: ChildState.WAITING, ChildEvent.ENDED: ChildState.STOPPED},
    ChildState.WAITING: {ChildEvent.SPAWNED: ChildState.STARTING, ChildEvent.ENDED: ChildState.STOPPED},
    ChildState.STOPPED: {},
}


class Child:
    """Owned by the supervisor's main thread: the kernel ties the death signal to the thread that started a process."""

    def __init__(self, spec: ChildSpec, log_path: Path, clock: Clock) -> None:
        self.spec = spec
        self.log_path = log_path
        self.state = ChildState.PLANNED
        self.backoff = Backoff()
        self.restart_at_s = 0.0
        self._clock = clock
        self._started_s = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id; 0 while it does not run."""
        return self._process.pid if self._process is not None else 0

    def spawn(self) -> None:
        """Start it in a process group of its own, so that a Ctrl-C at the terminal reaches the supervisor only."""
        supervisor, death_signal = os.getpid(), self.spec.death_signal

        def die_with_supervisor() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != supervisor:  # it died before the line above
                os._exit(1)

        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.spec.argv,
                env=dict(self.spec.env),
                cwd=PACKAGE_ROOT,  # Celery looks for `tasks` in the working folder first: let it find ours
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_supervisor,
            )
        self._started_s = self._clock()
        self._advance(ChildEvent.SPAWNED)

    def became_ready(self) -> None:
        self._advance(ChildEvent.BECAME_READY)

    def poll_death(self) -> tuple[int, int] | None:
        """Pid and exit status, once, after it has ended by itself; the next start is planned."""
        process = self._process
        if process is None or process.poll() is None:
            return None
        self._process = None
        now = self._clock()
        self.restart_at_s = now + self.backoff.delay_s(ran_s=now - self._started_s)
        self._advance(ChildEvent.DIED)
        return process.pid, process.returncode

    @property
    def is_due(self) -> bool:
        return self.state is ChildState.WAITING and self._clock() >= self.restart_at_s

    def signal(self, number: int) -> None:
        """To the process, not to its group: its own children end with it."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def end(self, *, kill: bool) -> None:
        """It will not be started again. With `kill`, by force and now."""
        if kill:
            self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None
        if self.state is not ChildState.STOPPED:
            self._advance(ChildEvent.ENDED)

    def _advance(self, event: ChildEvent) -> None:
        self.state = TRANSITIONS[self.state][event]


def exit_text(status: int) -> str:
    """ "exit status 1", "signal 9 (SIGKILL)"."""
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"signal {-status}"
