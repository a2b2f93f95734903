"""Times what a test promises in seconds, beside how late the machine runs what is due.

A promise such as "a death is noticed within a second" is one of the code, for threads that run when they are due. A
machine with more to do than it has processors for runs them later, and that says nothing about the code. So a thread
asks to be woken every few milliseconds, works a little, and adds up what it has waited beyond that: the code under test
has waited about as long.
"""

from __future__ import annotations

import threading
import time

SLEEP_S, WORK = 0.004, 4000  # a turn of the thread: it sleeps, then works for about 0.1 ms


class Stopwatch:
    """Use as a context around what is timed."""

    def __init__(self) -> None:
        self.taken_s = 0.0
        self.late_s = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stopwatch", daemon=True)
        self._start_s = 0.0

    def __enter__(self) -> Stopwatch:
        self._thread.start()
        self._start_s = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.taken_s = time.monotonic() - self._start_s
        self._ended.set()
        self._thread.join()

    def assert_within(self, promised_s: float, *, taken_s: float | None = None) -> None:
        """`taken_s`, or else the whole time, is less than what is promised and what this machine was late.

        Raises:
            AssertionError: it is not; with all three figures.
        """
        taken_s = self.taken_s if taken_s is None else taken_s
        assert taken_s < promised_s + self.late_s, (
            f"it took {taken_s:.3f} s, and at most {promised_s} s are promised; "
            f"this machine ran a thread that was due {self.late_s:.3f} s late in {self.taken_s:.3f} s"
        )

    def _watch(self) -> None:
        before_s, before_cpu_s = time.monotonic(), time.thread_time()
        while not self._ended.is_set():
            time.sleep(SLEEP_S)
            sum(range(WORK))
            now_s, now_cpu_s = time.monotonic(), time.thread_time()
            self.late_s += max(now_s - before_s - SLEEP_S - (now_cpu_s - before_cpu_s), 0.0)
            before_s, before_cpu_s = now_s, now_cpu_s
