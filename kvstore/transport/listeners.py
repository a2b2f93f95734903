"""Where writers knock: a unix socket for peers of this host and user, a tcp port for others, one more for rdma."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from kvstore.clock import Clock
from kvstore.transport.connection import Connection
from kvstore.transport.tls import Tls

BACKLOG = 128
ACCEPTS_PER_TURN = 16  # a storm of connections must not starve transfers
TCP_BUFFER_BYTES = 4 << 20
MAX_UNIX_PATH = 100  # the kernel takes 107 bytes

Accept = Callable[[Connection], None]


class UnixListener:
    """A Handler of the loop. Takes only peers of our own user."""

    def __init__(self, accept: Accept, clock: Clock, *, run_dir: str, name: str) -> None:
        self.path = _socket_path(run_dir, name)
        self._accept, self._clock = accept, clock
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.setblocking(False)
        self._sock.bind(self.path)
        Path(self.path).chmod(0o600)
        self._sock.listen(BACKLOG)

    wants_write = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def on_readable(self, now_s: float) -> None:
        for sock in _accepted(self._sock):
            connection = Connection(sock, "shm", now_s)
            if connection.peer_credentials()[1] == os.getuid():
                self._accept(connection)
            else:
                connection.close()

    def on_writable(self, now_s: float) -> None:  # noqa: ARG002  (a Handler's method; a listener never writes)
        return None

    def close(self) -> None:
        self._sock.close()
        with contextlib.suppress(FileNotFoundError):
            Path(self.path).unlink()


class TcpListener:
    """A Handler of the loop."""

    def __init__(self, accept: Accept, clock: Clock, *, bind: str, tls: Tls | None, protocol: str = "tcp") -> None:
        self._accept, self._clock, self._tls, self._protocol = accept, clock, tls, protocol
        self._sock = socket.socket(socket.AF_INET6 if ":" in bind else socket.AF_INET, socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TCP_BUFFER_BYTES)  # inherited by what it accepts
        self._sock.bind((bind, 0))
        self._sock.listen(BACKLOG)
        self.port = int(self._sock.getsockname()[1])

    wants_write = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def on_readable(self, now_s: float) -> None:
        for sock in _accepted(self._sock):
            connection = Connection(sock, self._protocol, now_s)
            try:
                if self._tls is not None:
                    connection.accept_tls(self._tls)
            except OSError:  # it is gone already
                connection.close()
            else:
                self._accept(connection)

    def on_writable(self, now_s: float) -> None:  # noqa: ARG002  (a Handler's method; a listener never writes)
        return None

    def close(self) -> None:
        self._sock.close()


def _accepted(listener: socket.socket) -> list[socket.socket]:
    found: list[socket.socket] = []
    with contextlib.suppress(OSError):  # none left, or it is gone already
        while len(found) < ACCEPTS_PER_TURN:
            found.append(listener.accept()[0])
    return found


def _socket_path(run_dir: str, name: str) -> str:
    """In the run folder, or where that makes too long a path, in a folder of our own under the temporary one."""
    file_name = f"kv-{hashlib.sha256(name.encode()).hexdigest()[:12]}.sock"
    folder = Path(run_dir) if run_dir else Path(tempfile.gettempdir()) / f"celeriac-{os.getuid()}"
    if len(str(folder / file_name)) > MAX_UNIX_PATH:
        folder = Path(tempfile.gettempdir()) / f"celeriac-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(folder / file_name)
