"""One thread that watches the sockets of requests in work: a client that left, a body that does not end.

WSGI only notices a gone client at a write, and a read has no deadline of its own.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Final

_log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.1


class SocketWatcher:
    """Thread `socket-watcher`. `watch` and `read_deadline` are context managers, for any thread."""

    def __init__(self) -> None:
        self._clients: dict[socket.socket, Callable[[], None]] = {}
        self._reads: dict[socket.socket, float] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="socket-watcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    @contextlib.contextmanager
    def watch(self, sock: socket.socket | None, on_gone: Callable[[], None]) -> Iterator[None]:
        """Calls `on_gone` once (in the watcher's thread) when the peer closes. No socket: nothing is watched."""
        if sock is None:
            yield
            return
        with self._lock:
            self._clients[sock] = on_gone
        try:
            yield
        finally:
            with self._lock:
                self._clients.pop(sock, None)

    @contextlib.contextmanager
    def read_deadline(self, sock: socket.socket, seconds: float) -> Iterator[None]:
        """Reads from `sock` end (as if the peer had closed) `seconds` from now."""
        with self._lock:
            self._reads[sock] = time.monotonic() + seconds
        try:
            yield
        finally:
            self.end_read_deadline(sock)

    def end_read_deadline(self, sock: socket.socket) -> None:
        """What was waited for has come. Does nothing where no deadline is set."""
        with self._lock:
            self._reads.pop(sock, None)

    def look(self, now_s: float) -> None:
        """One look at every socket; never blocks."""
        with self._lock:
            clients = list(self._clients.items())
            late = [sock for sock, end_s in self._reads.items() if end_s <= now_s]
            for sock in late:
                del self._reads[sock]
        for sock in late:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)
        for sock, on_gone in clients:
            if _is_gone(sock):
                with self._lock:
                    is_ours = self._clients.pop(sock, None) is not None
                if is_ours:
                    on_gone()

    def _run(self) -> None:
        while not self._stopped.wait(LOOK_EVERY_S):
            try:
                self.look(time.monotonic())
            except Exception:
                _log.exception("looking at sockets failed, trying again")


def _is_gone(sock: socket.socket) -> bool:
    """End of file or a reset; bytes that wait (a pipelined request) are no end."""
    try:
        poller = select.poll()
        poller.register(sock, select.POLLIN | select.POLLRDHUP)
        events = poller.poll(0)
        if not events:
            return False
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except (OSError, ValueError):
        return True
