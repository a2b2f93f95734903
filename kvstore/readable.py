"""Waiting for descriptors, however many a process has: `select.select` refuses numbers of 1,024 and more."""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterable
from typing import Protocol, TypeVar


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


S = TypeVar("S", bound="int | _HasFileno")


def wait_readable(sources: Iterable[S], timeout_s: float | None = None) -> list[S]:
    """Those of `sources` that can be read, at their end or broken; empty after `timeout_s` (None: wait for ever).

    Raises:
        OSError: a source is closed.
    """
    poller, by_fd = select.poll(), {}
    for source in sources:
        fd = source if isinstance(source, int) else source.fileno()
        by_fd[fd] = source
        poller.register(fd, select.POLLIN)
    found = poller.poll(None if timeout_s is None else max(timeout_s, 0.0) * 1e3)
    if any(mask & select.POLLNVAL for _, mask in found):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return [by_fd[fd] for fd, _ in found]
