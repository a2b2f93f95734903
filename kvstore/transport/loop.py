"""The event loop of the `kv` thread: epoll, commands of other threads, slices of work, and a tick. It never spins.

    kv thread      asleep in epoll_wait ──▶ a turn: sockets, commands, a slice of work, what is queued goes out ──▶ ...
    another one    `run_here`: a turn of its own while the kv thread sleeps, so that a small thing waits for no wake-up

One lock is held for the length of a turn: whoever is in a turn owns all that the loop serves.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
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
    """`post` and `run_here` are for any thread; all else belongs to the thread that is in a turn."""

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
        self._turn = threading.Lock()
        self._is_idle = False  # asleep, with nothing to do but wait: no work, nothing that a socket did not take

    def post(self, command: Callable[[], None]) -> None:
        """Run `command` in the loop's thread, in the order of the calls."""
        self._commands.append(command)
        self._wake()

    def run_here(self, command: Callable[[], bool], work: Callable[[], bool]) -> bool:
        """Run `command` and a slice of `work` in the calling thread, now, if the loop has nothing else to do.

        False, and nothing is done, if the loop is in a turn, has work, or `command` says False, before it does
        anything: then `post` it. Never waits. What the command raises is raised here.
        """
        if not self._turn.acquire(blocking=False):
            return False
        try:
            if not self._is_idle or self._commands or not command():
                return False
            has_work = work()
            self._is_idle = self._write_out(self.clock()) and not has_work
            if has_work:
                self._wake()
            return True
        finally:
            self._turn.release()

    def add(self, handler: Handler) -> None:
        fd = handler.fileno()
        self._handlers[fd] = handler
        self._masks[fd] = select.EPOLLIN | (select.EPOLLOUT if handler.wants_write else 0)
        self._epoll.register(fd, self._masks[fd])
        self.tick_by(self.clock() + TICK_S)

    def remove(self, handler: Handler) -> None:
        """Before its socket is closed."""
        fd = handler.fileno()
        if self._handlers.get(fd) is handler:
            del self._handlers[fd], self._masks[fd]
            self._epoll.unregister(fd)

    def tick_by(self, at_s: float) -> None:
        """The next tick comes at this time, to the millisecond, or earlier."""
        self._next_tick_s = min(self._next_tick_s, at_s)

    def stop(self) -> None:
        self._is_stopping = True

    def run(self, *, tick: Callable[[float], bool], work: Callable[[], bool], tell: Callable[[], None]) -> None:
        """Until `stop`. `work` does one slice and says if there is more; `tick` says if time matters to somebody.

        `tell` passes news on to other threads. It is called before whatever may take long, and else at the end of a
        turn: a thread that is woken sooner waits for the GIL, and that costs it a second wake-up.
        """
        has_work = False
        with self._turn:
            while not self._is_stopping:
                for fd, mask in self._wait(0.0 if has_work else max(self._next_tick_s - self.clock(), 0.0)):
                    tell()
                    self._dispatch(fd, mask)
                while self._commands:
                    self._commands.popleft()()
                has_work = work()
                now = self.clock()
                if now >= self._next_tick_s:
                    self._next_tick_s = now + IDLE_TICK_S  # `tick` may ask for an earlier one
                    if tick(now):
                        self.tick_by(now + TICK_S)
                is_out = self._write_out(now)
                self._is_idle = is_out and not has_work
                tell()
            self._is_idle = False

    def close(self) -> None:
        self._epoll.close()
        os.close(self._wake_fd)
        self._wake_fd = -1

    def _wait(self, wait_s: float) -> list[tuple[int, int]]:
        self._turn.release()
        try:
            return self._epoll.poll(wait_s)
        finally:
            self._turn.acquire()
            self._is_idle = False

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: it is awake anyway; closed: nobody listens
            os.eventfd_write(self._wake_fd, 1)

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

    def _write_out(self, now_s: float) -> bool:
        """What was queued meanwhile goes out now; what a socket does not take waits for EPOLLOUT. True: all is out."""
        is_out = True
        for fd, handler in list(self._handlers.items()):
            if handler.wants_write:
                handler.on_writable(now_s)
            if self._handlers.get(fd) is not handler:
                continue
            is_waiting = handler.wants_write
            is_out = is_out and not is_waiting
            mask = select.EPOLLIN | (select.EPOLLOUT if is_waiting else 0)
            if mask != self._masks[fd]:
                self._masks[fd] = mask
                self._epoll.modify(fd, mask)
        return is_out
