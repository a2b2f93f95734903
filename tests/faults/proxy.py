"""A tcp relay that makes faults: delays, limits, bytes held back, changed or cut off. For nodes that talk over tcp.

writer ──▶ Proxy.port ══ to_receiver: Way ══▶ target port          and back by `to_writer`
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.readable import wait_readable

PIECE_BYTES = 64 << 10
MAX_WAITING_BYTES = 256 << 10  # per direction of a pair: behind it the sender feels it
TURN_S = 0.005


@dataclass(eq=False)
class Way:
    """What happens to bytes of one direction. Knobs may be turned at any time, by any thread."""

    delay_s: float = 0.0
    bytes_per_s: float = 0.0  # 0: as many as come
    is_held: bool = False  # nothing passes, nothing is closed: a half-open peer
    edit: Callable[[bytes], bytes] | None = None  # what to pass on instead; shorter: the rest is lost
    num_bytes: int = 0  # passed on


@dataclass(eq=False)
class _Pair:
    near: socket.socket
    far: socket.socket
    waiting: dict[socket.socket, deque[tuple[float, bytes]]] = field(default_factory=dict)
    allowed: dict[socket.socket, float] = field(default_factory=dict)
    ended: set[socket.socket] = field(default_factory=set)

    def __post_init__(self) -> None:
        for sock in (self.near, self.far):
            sock.setblocking(False)
            self.waiting[sock], self.allowed[sock] = deque(), 0.0

    def close(self, *, is_reset: bool) -> None:
        for sock in (self.near, self.far):
            if is_reset:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()


class Proxy:
    """One thread for all its connections. Use as a context."""

    def __init__(self, target_port: int, *, target_host: str = "127.0.0.1", bind: str = "127.0.0.1") -> None:
        self.to_receiver, self.to_writer = Way(), Way()
        self._target = (target_host, target_port)
        self._listener = socket.create_server((bind, 0))
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._pairs: list[_Pair] = []
        self._wanted_cut: bool | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def cut(self, *, is_reset: bool) -> None:
        """Close all connections, by FIN or by RST. Ones that come later are passed on."""
        self._wanted_cut = is_reset
        for _ in range(1000):
            if self._wanted_cut is None:
                return
            time.sleep(TURN_S)
        raise TimeoutError("the proxy did not cut its connections")

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        self._thread.join(10)
        self._listener.close()
        for pair in self._pairs:
            pair.close(is_reset=False)

    # ---------------------------------------------------------------- its thread
    def _run(self) -> None:
        last_s = time.monotonic()
        while not self._is_stopping:
            readable = self._wait()
            now = time.monotonic()
            if self._wanted_cut is not None:
                for pair in self._pairs:
                    pair.close(is_reset=self._wanted_cut)
                self._pairs.clear()
                self._wanted_cut = None
                continue
            if self._listener in readable:
                self._accept()
            for pair in list(self._pairs):
                try:
                    self._turn(pair, readable, now, now - last_s)
                except OSError:
                    pair.close(is_reset=True)
                    self._pairs.remove(pair)
            last_s = now

    def _wait(self) -> list[socket.socket]:
        sources = [self._listener]
        is_busy = False
        for pair in self._pairs:
            for source, way in ((pair.near, self.to_receiver), (pair.far, self.to_writer)):
                num_waiting = sum(len(piece) for _, piece in pair.waiting[source])
                if source not in pair.ended and not way.is_held and num_waiting < MAX_WAITING_BYTES:
                    sources.append(source)
                is_busy = is_busy or num_waiting > 0
        return wait_readable(sources, TURN_S if is_busy else 10 * TURN_S)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            self._pairs.append(_Pair(near, socket.create_connection(self._target, timeout=2)))
        except OSError:
            near.close()

    def _turn(self, pair: _Pair, readable: list[socket.socket], now: float, since_s: float) -> None:
        ways = ((pair.near, pair.far, self.to_receiver), (pair.far, pair.near, self.to_writer))
        for source, sink, way in ways:
            if source in readable:
                piece = source.recv(PIECE_BYTES)
                if piece:
                    pair.waiting[source].append((now + way.delay_s, way.edit(piece) if way.edit else piece))
                else:
                    pair.ended.add(source)
            self._pass_on(pair, source, sink, way, now, since_s)
        if len(pair.ended) == 2 or (pair.ended and not any(pair.waiting[source] for source in pair.ended)):
            pair.close(is_reset=False)
            self._pairs.remove(pair)

    def _pass_on(
        self, pair: _Pair, source: socket.socket, sink: socket.socket, way: Way, now: float, since_s: float
    ) -> None:
        waiting = pair.waiting[source]
        allowed = min(pair.allowed[source] + since_s * way.bytes_per_s, max(way.bytes_per_s / 10, 1.0))
        while waiting and waiting[0][0] <= now and not way.is_held:
            due_s, piece = waiting.popleft()
            room = len(piece) if way.bytes_per_s == 0 else min(len(piece), int(allowed))
            try:
                num_sent = sink.send(piece[:room]) if room else 0
            except BlockingIOError:
                num_sent = 0
            allowed -= num_sent
            way.num_bytes += num_sent
            if num_sent < len(piece):
                waiting.appendleft((due_s, piece[num_sent:]))
                break
        pair.allowed[source] = allowed
