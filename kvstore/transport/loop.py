"""The event loop of the `kv` thread: epoll, commands of other threads, slices of work, and a tick. It never spins."""

from __future__ import annotations

import contextlib
import os
import select
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kvstore.clock import Clock

TICK_S = 0.1
IDLE_TICK_S = 1.0


class Handler(Protocol):
    """A socket and what to do with it. Every method may close it, and then calls `Loop.remove`."""

    def fileno(self) -> int: ...
    @property
    def wants_write(self) -> bool: ...
    def on_readable(self, now_s: float) -> None: ...
    def on_writable(self, now_s: float) -> None: ...


class Loop:
    """`post` is for any thread; all else belongs to the thread that is in `run`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}
        self._masks: dict[int, int] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wake_fd, select.EPOLLIN)
        self._is_stopping = False
        self._next_tick_s = clock()

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` in the loop's thread, in the order of the calls."""
        self._commands.append(command)
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is awake anyway; closed: nobody listens
            os.eventfd_write(self._wake_fd, 1)

    def add(self, handler: Handler) -> None:
        fd = handler.fileno()
        self._handlers[fd] = handler
        self._masks[fd] = select.EPOLLIN | (select.EPOLLOUT if handler.wants_write else 0)
        self._epoll.register(fd, self._masks[fd])
        self._next_tick_s = min(self._next_tick_s, self.clock() + TICK_S)

    def remove(self, handler: Handler) -> None:
        """Before its socket is closed."""
        fd = handler.fileno()
        if self._handlers.get(fd) is handler:
            del self._handlers[fd], self._masks[fd]
            self._epoll.unregister(fd)

    def stop(self) -> None:
        self._is_stopping = True

    def run(self, *, tick: Callable[[float], bool], work: Callable[[], bool]) -> None:
        """Until `stop`. `work` does one slice and says if there is more; `tick` says if time matters to somebody."""
        has_work = False
        while not self._is_stopping:
            wait_s = 0.0 if has_work else max(self._next_tick_s - self.clock(), 0.0)
            for fd, mask in self._epoll.poll(wait_s):
                self._dispatch(fd, mask)
            while self._commands:
                self._commands.popleft()()
            has_work = work()
            now = self.clock()
            if now >= self._next_tick_s:
                self._next_tick_s = now + (TICK_S if tick(now) else IDLE_TICK_S)
            self._write_out(now)

    def close(self) -> None:
        self._epoll.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    def _dispatch(self, fd: int, mask: int) -> None:
        if fd == self._wake_fd:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            return
        handler = self._handlers.get(fd)
        if handler is None:
            return
        if mask & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
            handler.on_readable(self.clock())
        if mask & select.EPOLLOUT and self._handlers.get(fd) is handler:
            handler.on_writable(self.clock())

    def _write_out(self, now_s: float) -> None:
        """What was queued meanwhile goes out now; what the socket does not take waits for EPOLLOUT."""
        for fd, handler in list(self._handlers.items()):
            if handler.wants_write:
                handler.on_writable(now_s)
            if self._handlers.get(fd) is not handler:
                continue
            mask = select.EPOLLIN | (select.EPOLLOUT if handler.wants_write else 0)
            if mask != self._masks[fd]:
                self._masks[fd] = mask
                self._epoll.modify(fd, mask)
