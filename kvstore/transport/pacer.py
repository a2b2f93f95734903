"""A timer of the loop, finer than the millisecond of epoll's timeout: for work that nobody announces.

Whoever waits for such work asks for the next look; without anyone who asks, nothing wakes the thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Final

CLOCK_MONOTONIC: Final = 1
FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
MIN_WAIT_S: Final = 50e-6


class _Spec(ctypes.Structure):
    """struct itimerspec: an interval (never used here), then the first expiry."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Pacer:
    """A Handler of the loop. Owned by the `kv` thread."""

    def __init__(self) -> None:
        """Raises OSError: no timer."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(CLOCK_MONOTONIC, FLAGS)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), "timerfd_create")
        self._is_set = False

    wants_write = False

    def fileno(self) -> int:
        return int(self._fd)

    def wake_in(self, seconds: float) -> None:
        """Make the loop turn after this time, or earlier if somebody has asked for that already."""
        if self._is_set:
            return
        self._is_set = True
        spec = _Spec(0, 0, 0, max(int(seconds * 1e9), int(MIN_WAIT_S * 1e9)))
        self._libc.timerfd_settime(self._fd, 0, ctypes.byref(spec), None)

    def on_readable(self, now_s: float) -> None:  # noqa: ARG002  (a Handler's method)
        self._is_set = False
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, 8)

    def on_writable(self, now_s: float) -> None:  # noqa: ARG002  (a Handler's method; a timer is never written)
        return None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
