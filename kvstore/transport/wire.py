"""The bytes under a connection: a plain socket, or TLS over one. Neither blocks, neither copies what pages hold."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Protocol

AHEAD_BYTES = 4096


class Wire(Protocol):
    """`max_views`: more than so many are not looked at in one call."""

    max_views: int
    is_resending: bool  # after BlockingIOError the next `send` must offer the very same bytes

    def send(self, views: Sequence[memoryview]) -> int:
        """Bytes taken, from the first view on. Raises BlockingIOError, OSError."""
        ...

    def receive(self, views: Sequence[memoryview]) -> int:
        """Bytes put into the views; 0: the peer has closed. Raises BlockingIOError, OSError."""
        ...

    def read_ahead(self) -> memoryview:
        """What was read and not asked for; of a plain socket, if that is nothing, as much as is there, up to 4 KiB.

        Empty: this wire does not read ahead. Raises BlockingIOError, EOFError, OSError.
        """
        ...

    def skip(self, num_bytes: int) -> None:
        """The first bytes of `read_ahead` were used."""
        ...

    def come_up(self) -> None:
        """What it takes before the first byte. Raises BlockingIOError, HandshakeRefused, OSError."""
        ...

    @property
    def wants_write(self) -> bool | None:
        """What a wire that is not up yet waits for; None: it is up, ask whoever has something to send."""
        ...

    @property
    def num_buffered_bytes(self) -> int:
        """Bytes that `receive` has for us and epoll does not know of."""
        ...


class PlainWire:
    """Reads ahead where little is asked for: headers and bodies of small frames come by one call. Pages never do."""

    max_views = 512  # the kernel takes 1,024
    is_resending = False
    wants_write = None

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._ahead = memoryview(bytearray(AHEAD_BYTES))
        self._unread = self._ahead[:0]
        self._is_dry = False  # the last call took all there was; only epoll knows of more

    def come_up(self) -> None:
        return None

    def send(self, views: Sequence[memoryview]) -> int:
        return socket.socket.sendmsg(self._sock, views)  # not that of an SSLSocket, if it is one

    @property
    def num_buffered_bytes(self) -> int:
        return len(self._unread)

    def receive(self, views: Sequence[memoryview]) -> int:
        if not self._unread:
            self._check_dry()
            if len(views) > 1:
                return self._sock.recvmsg_into(views)[0]
            if len(views[0]) >= AHEAD_BYTES:
                return self._sock.recv_into(views[0])
            self._fill()
        num_taken = 0
        for view in views:
            count = min(len(view), len(self._unread))
            view[:count] = self._unread[:count]
            self._unread = self._unread[count:]
            num_taken += count
        return num_taken

    def read_ahead(self) -> memoryview:
        if not self._unread:
            self._check_dry()
            if not self._fill():
                raise EOFError("closed by the peer")
        return self._unread

    def skip(self, num_bytes: int) -> None:
        self._unread = self._unread[num_bytes:]

    def _check_dry(self) -> None:
        if self._is_dry:
            self._is_dry = False
            raise BlockingIOError

    def _fill(self) -> int:
        num_bytes = self._sock.recv_into(self._ahead)
        self._unread, self._is_dry = self._ahead[:num_bytes], 0 < num_bytes < AHEAD_BYTES
        return num_bytes
