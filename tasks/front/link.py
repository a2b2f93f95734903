"""Our end of the socketpair to the engine process. Never blocks: what does not fit waits here. Output thread only."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from engines.messages import EngineMessage, FrameReader, FrontMessage, decode_engine, frame

READ_BYTES = 1 << 20
MAX_VECTORS = 64  # far below the kernel's IOV_MAX


class EngineLink:
    """One connection at a time; a new engine is attached after the old one's EOF."""

    def __init__(self) -> None:
        self._sock: socket.socket | None = None
        self._reader = FrameReader()
        self._unsent: deque[memoryview] = deque()
        self._is_held = False

    @property
    def is_attached(self) -> bool:
        return self._sock is not None

    @property
    def wants_write(self) -> bool:
        return bool(self._unsent)

    def fileno(self) -> int:
        assert self._sock is not None
        return self._sock.fileno()

    def attach(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock, self._reader = sock, FrameReader()
        self._unsent.clear()

    def detach(self) -> None:
        """Close our end: an engine that still lives leaves."""
        if self._sock is not None:
            self._sock.close()
        self._sock = None
        self._unsent.clear()

    def send(self, message: FrontMessage) -> None:
        """Queue a message, and send what fits. Without an engine it goes nowhere: nobody is left to do it."""
        if self._sock is None:
            return
        self._unsent.append(memoryview(frame(message)))
        if not self._is_held:
            self.flush()

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is sent within goes out at its end, in one piece: an idle engine begins one step with all of it."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
            self.flush()

    def flush(self) -> None:
        while self._sock is not None and self._unsent:
            try:
                num_sent = self._sock.sendmsg(list(islice(self._unsent, MAX_VECTORS)))
            except BlockingIOError:
                return
            except OSError:  # its death is told by `receive`, once, after what it had still sent
                self._unsent.clear()
                return
            while num_sent:
                first = self._unsent.popleft()
                if num_sent < len(first):
                    self._unsent.appendleft(first[num_sent:])
                num_sent -= min(num_sent, len(first))

    def receive(self) -> tuple[list[EngineMessage], bool]:
        """Messages that are there, and whether this was the end (EOF: the engine is dead)."""
        if self._sock is None:
            return [], False
        messages: list[EngineMessage] = []
        try:
            chunk = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            return messages, False
        except OSError:
            return messages, True
        messages += [decode_engine(body) for body in self._reader.feed(chunk)]
        return messages, not chunk
