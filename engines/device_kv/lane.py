"""A thread that copies: jobs one after the other, in the order they came."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Protocol

Job = Callable[[], None]
STOP_TIMEOUT_S = 5.0


class Lane(Protocol):
    """Where copies are done. `submit` is for any thread."""

    def submit(self, job: Job) -> None:
        """Run `job` behind all that were submitted before it."""
        ...

    def start(self) -> None: ...
    def stop(self) -> None: ...


class CopyThread:
    """The real one. It sleeps while there is nothing to do.

    Args:
        on_failure: told once, in this thread, what a job raised; no job runs after that.
    """

    def __init__(self, name: str, on_failure: Callable[[Exception], None]) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._on_failure = on_failure
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Finish the job under way, drop the others. Safe to repeat."""
        self._is_stopping = True
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None and not self._is_stopping:
            try:
                job()
            except Exception as error:  # whatever it is, the engine thread ends the process for it
                self._on_failure(error)
                return
