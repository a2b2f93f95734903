"""The engine's end of the socketpair to its front. Free of torch.

    engine thread   send ── blocks until it is out ─┐
    kv thread       post ── never blocks ───────────┴▶ unsent frames, in order ──▶ socket

Whoever holds the lock writes; who does not get it leaves the frame to whoever has it, or to the engine's next turn.
"""

from __future__ import annotations

import socket
import threading
from collections import deque

import msgspec

from engines.messages import EngineMessage, FrameReader, frame
from engines.process import SOCKET_BUFFER_BYTES, EngineConfig

READ_BYTES = 1 << 20


class FrontLink:
    """`post` is for any thread; all else belongs to the engine thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self.sock = sock
        self._reader = FrameReader()
        self._frames: list[bytes] = []
        self._unsent: deque[memoryview] = deque()
        self._sending = threading.Lock()

    def send(self, message: EngineMessage) -> None:
        """Raises ConnectionError: the front is gone."""
        self._unsent.append(memoryview(frame(message)))
        self.flush()

    def flush(self) -> None:
        """What `post` could not write at once goes out. Raises as `send`."""
        if not self._unsent:
            return
        with self._sending:
            while self._unsent:
                self.sock.sendall(self._unsent[0])
                self._unsent.popleft()

    def post(self, message: EngineMessage) -> bool:
        """False: it waits for the engine's next turn (the socket is full, in use, or broken): wake the engine."""
        self._unsent.append(memoryview(frame(message)))
        if not self._sending.acquire(blocking=False):
            return False
        try:
            while self._unsent:
                num_sent = self.sock.send(self._unsent[0], socket.MSG_DONTWAIT)
                if num_sent < len(self._unsent[0]):
                    self._unsent[0] = self._unsent[0][num_sent:]
                else:
                    self._unsent.popleft()
            return True
        except OSError:  # the engine thread meets it, too, and knows what to do
            return False
        finally:
            self._sending.release()

    def read_config(self) -> EngineConfig:
        while not self._frames:
            self._frames += self._reader.feed(self._receive())
        return msgspec.msgpack.decode(self._frames.pop(0), type=EngineConfig)

    def frames(self) -> list[bytes]:
        """Frames that are there; reads once, so call it when the socket is readable or frames are left."""
        frames, self._frames = self._frames, []
        return frames + self._reader.feed(self._receive())

    def _receive(self) -> bytes:
        chunk = self.sock.recv(READ_BYTES)
        if not chunk:
            raise EOFError("the front is gone")
        return chunk
