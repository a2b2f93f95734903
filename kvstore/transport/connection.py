"""One non-blocking stream between two KV nodes: frames out of a queue, frames into bodies or straight into pages.

Owned by the `kv` thread. Knows the wire format and nothing of grants: whoever reads passes a `PageSink`, which says
where the pages of a DATA frame go, or refuses them before a byte is written.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from kvstore.transport.errors import BadFrame, HandshakeRefused
from kvstore.transport.frames import (
    DATA_HEADER,
    HEADER,
    MAX_LENGTH,
    DataHeader,
    FrameType,
    parse_data_header,
    parse_header,
)
from kvstore.transport.tls import Tls, TlsWire
from kvstore.transport.wire import PlainWire, Wire

READ_BUDGET_BYTES = 8 << 20  # per call, so that one busy link does not starve the others
CONTROL_LIMIT_BYTES = 64 << 20  # queued to a peer that does not read


class PageSink(Protocol):
    def page_views(self, header: DataHeader, num_bytes: int) -> list[memoryview]:
        """Where to put `num_bytes` of page runs. Raises BadFrame; then nothing is written."""
        ...


@dataclass(slots=True, eq=False)
class _Outgoing:
    views: deque[memoryview]
    num_bytes: int
    tag: str = ""  # transfer whose source pages these are
    fds: Sequence[int] = ()
    is_started: bool = False


@dataclass(slots=True)
class _Incoming:
    """What is being read: `targets` are filled in order."""

    targets: deque[memoryview] = field(default_factory=deque)
    kind: FrameType = FrameType.HEARTBEAT
    length: int = 0
    raw: bytearray = field(default_factory=bytearray)
    header: DataHeader | None = None
    since_s: float | None = None  # when its first byte came


class _Stage(Enum):
    HEADER = auto()
    BODY = auto()
    DATA_HEADER = auto()
    PAGES = auto()


class Connection:
    """`last_heard_s` and `last_progress_s` are set by the owner's clock through `now_s` of each call."""

    def __init__(self, sock: socket.socket, protocol: str, now_s: float) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.protocol = protocol
        self.last_heard_s = now_s
        self.last_sent_s = now_s
        self.expects_welcome = False  # the end that dials, of one that knows the secret: it may be larger
        self.is_greeting = True  # small frames only, and descriptors may come
        self.fds: list[int] = []
        self._sock = sock
        self._wire: Wire = PlainWire(sock)
        self._is_broken = False  # TLS that has failed: nothing can be said any more
        self._out_since_s: float | None = None  # when its first frame came to be the first
        self._out_head_bytes = 0
        self._out: deque[_Outgoing] = deque()
        self._out_bytes = 0
        self._in = _Incoming()
        self._stage = _Stage.HEADER
        self._expect(_Stage.HEADER, HEADER.size)

    def fileno(self) -> int:
        return self._sock.fileno()

    def connect_result(self) -> int | None:
        """Of a `connect` that was begun: 0 when it is through, None while it goes on, else the errno."""
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            return code
        try:
            self._sock.getpeername()
        except OSError:
            return None
        return 0

    def peer_credentials(self) -> tuple[int, int]:
        """(pid, uid) of the process at the other end of a unix socket; (0, -1) for tcp."""
        if self._sock.family != socket.AF_UNIX:
            return 0, -1
        pid, uid, _ = struct.unpack("3i", self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return pid, uid

    def accept_tls(self, tls: Tls) -> None:
        """Before anything is read: the peer must begin with TLS."""
        self._use(tls.accept(self._sock))

    def dial_tls(self, tls: Tls, host: str) -> None:
        """Before anything is sent, over a socket that is connected. `host`: whom the certificate must name."""
        self._use(tls.dial(self._sock, host))

    def _use(self, wire: TlsWire) -> None:
        self._wire, self._sock = wire, wire.sock  # of the same descriptor

    @property
    def num_queued_bytes(self) -> int:
        return self._out_bytes

    @property
    def wants_write(self) -> bool:
        wanted = self._wire.wants_write
        return self._out_bytes > 0 if wanted is None or self._is_broken else wanted

    def check_pace(self, now_s: float, *, grace_s: float, min_bytes_per_s: float) -> None:
        """A peer that sends or takes a frame byte by byte must not hold what belongs to the frame for ever.

        Raises:
            BadFrame: a frame has taken longer than `grace_s` and its length at `min_bytes_per_s` (`too_slow`).
        """
        out_since_s = self._out_since_s if self._out else None
        frames = (("coming", self._in.since_s, self._in.length), ("going", out_since_s, self._out_head_bytes))
        for name, since_s, num_bytes in frames:
            if since_s is not None and now_s - since_s > grace_s + num_bytes / min_bytes_per_s:
                taken_s = now_s - since_s
                raise BadFrame(reason="too_slow", detail=f"a frame of {num_bytes} bytes is {name} for {taken_s:.1f} s")

    @property
    def is_closed(self) -> bool:
        return self._sock.fileno() < 0

    # ---------------------------------------------------------------- out
    def send(self, data: bytes, *, fds: Sequence[int] = ()) -> None:
        """Queue a control frame. Descriptors go with its first byte.

        Raises:
            BadFrame: the peer has not read for so long that the queue is full (`backlog`).
        """
        if self._out_bytes + len(data) > CONTROL_LIMIT_BYTES:
            raise BadFrame(reason="backlog", detail=f"{self._out_bytes} bytes are queued")
        self._queue(_Outgoing(deque([memoryview(data)]), len(data), fds=fds))

    def send_pages(self, header: bytes, views: Sequence[memoryview], *, tag: str) -> object:
        """Queue a DATA frame that reads `views` when it is sent: they must not change until `is_sending` is False.

        Returns what `is_reading` asks for.
        """
        item = _Outgoing(deque([memoryview(header), *views]), len(header) + sum(map(len, views)), tag)
        self._queue(item)
        return item

    def is_reading(self, sent: object) -> bool:
        """Whether this frame's views are still to be read."""
        return any(item is sent for item in self._out)

    def drop_unsent(self, tag: str) -> None:
        """Forget DATA frames of a transfer, and read its pages no more.

        One that is half on the wire must be finished. What is left of it is copied, so that a peer that has stopped
        reading does not hold the pages.
        """
        kept = deque(item for item in self._out if item.tag != tag or item.is_started)
        for item in kept:
            if item.tag == tag:
                item.views, item.tag = deque([memoryview(b"".join(item.views))]), ""
        if not kept or kept[0] is not self._out[0]:
            self._out_since_s = None
        self._out_bytes = sum(item.num_bytes for item in kept)
        self._out = kept

    def is_sending(self, tag: str) -> bool:
        return any(item.tag == tag for item in self._out)

    def flush(self, now_s: float) -> None:
        """Send what the socket takes. Raises OSError, HandshakeRefused: the connection is gone."""
        with contextlib.suppress(BlockingIOError):
            self._come_up()
            while self._out:
                if self._out_since_s is None:
                    self._out_since_s, self._out_head_bytes = now_s, self._out[0].num_bytes
                self._send_some(now_s)

    def _come_up(self) -> None:
        try:
            self._wire.come_up()
        except HandshakeRefused as error:
            self._break(error)
            raise

    def _break(self, error: HandshakeRefused) -> None:
        """TLS has failed: what waits is not said. Only a peer that does not speak TLS can still be told why."""
        self._out.clear()
        self._out_bytes = 0
        if error.reason == "not_tls":
            self._wire = PlainWire(self._sock)
        else:
            self._is_broken = True

    def _queue(self, item: _Outgoing) -> None:
        if self._is_broken:
            return
        self._out.append(item)
        self._out_bytes += item.num_bytes

    def _send_some(self, now_s: float) -> None:
        views: list[memoryview] = []
        limit = self._wire.max_views
        for item in self._out:
            if item.fds and views:
                break
            views.extend(view for view, _ in zip(item.views, range(limit - len(views)), strict=False))
            if item.fds or len(views) >= limit:
                break
        first = self._out[0]
        if first.fds:
            num_sent = socket.send_fds(self._sock, views, list(first.fds))
            first.fds = ()
        else:
            try:
                num_sent = self._wire.send(views)
            except BlockingIOError:
                first.is_started = first.is_started or self._wire.is_resending
                raise
        self.last_sent_s = now_s
        self._out_bytes -= num_sent
        while num_sent:
            item = self._out[0]
            item.is_started = True
            view = item.views.popleft()
            item.num_bytes -= min(num_sent, len(view))
            if num_sent < len(view):
                item.views.appendleft(view[num_sent:])
                return
            num_sent -= len(view)
            if not item.views:
                self._out.popleft()
                self._out_since_s = None

    # ---------------------------------------------------------------- in
    def read(self, sink: PageSink, now_s: float) -> Iterator[tuple[FrameType, bytearray | DataHeader]]:
        """Whole frames that are there: (type, body), or (DATA, header) when its pages have landed.

        Raises:
            BadFrame, HandshakeRefused (TLS), EOFError, OSError: the connection must be closed.
        """
        budget = READ_BUDGET_BYTES
        while budget > 0 or self._wire.num_buffered_bytes:
            try:
                done = self._take_frame()
                if done is not None:
                    self.last_heard_s = now_s
                    budget -= HEADER.size + len(done[1])
                    yield done
                    continue
                num_bytes = self._receive()
            except BlockingIOError:
                return
            except HandshakeRefused as error:
                self._break(error)
                raise
            if num_bytes == 0:
                raise EOFError("closed by the peer")
            self.last_heard_s = now_s
            if self._in.since_s is None:
                self._in.since_s = now_s
            budget -= num_bytes
            if not self._in.targets:
                whole = self._advance(sink)
                if whole is not None:
                    yield whole

    def _take_frame(self) -> tuple[FrameType, bytearray] | None:
        """A control frame that has come whole, as most do: in one step. None: by the steps that all frames can take."""
        if self.is_greeting or self._stage is not _Stage.HEADER or self._in.since_s is not None:
            return None
        ahead = self._wire.read_ahead()
        if len(ahead) < HEADER.size:
            return None
        kind, length = parse_header(ahead[: HEADER.size])
        end = HEADER.size + length
        if kind is FrameType.DATA or end > len(ahead):
            return None
        body = bytearray(ahead[HEADER.size : end])
        self._wire.skip(end)
        return kind, body

    def _receive(self) -> int:
        targets = self._in.targets
        views = [view for view, _ in zip(targets, range(self._wire.max_views), strict=False)]
        if self.is_greeting and self._sock.family == socket.AF_UNIX:
            num_bytes, ancillary, _, _ = self._sock.recvmsg_into(views, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self.fds += memoryview(payload[: len(payload) // 4 * 4]).cast("i").tolist()
        else:
            num_bytes = self._wire.receive(views)
        left = num_bytes
        while left:
            view = targets.popleft()
            if left < len(view):
                targets.appendleft(view[left:])
                break
            left -= len(view)
        return num_bytes

    def _expect(self, stage: _Stage, num_bytes: int) -> None:
        self._stage = stage
        self._in.raw = bytearray(num_bytes)
        self._in.targets.append(memoryview(self._in.raw))

    def _advance(self, sink: PageSink) -> tuple[FrameType, bytearray | DataHeader] | None:
        """The targets are full: what comes next? A frame, when one is whole."""
        incoming = self._in
        if self._stage is _Stage.HEADER:
            incoming.kind, incoming.length = parse_header(incoming.raw)
            is_welcome = self.expects_welcome and incoming.kind is FrameType.WELCOME
            limit = MAX_LENGTH[FrameType.WELCOME if is_welcome else FrameType.HELLO]
            if self.is_greeting and (incoming.length > limit or incoming.kind is FrameType.DATA):
                raise BadFrame(
                    reason="state", detail=f"{incoming.kind.name} of {incoming.length} bytes in the handshake"
                )
            if incoming.kind is FrameType.DATA:
                self._expect(_Stage.DATA_HEADER, DATA_HEADER.size)
                return None
            if incoming.length:
                self._expect(_Stage.BODY, incoming.length)
                return None
            incoming.raw = bytearray()
        elif self._stage is _Stage.DATA_HEADER:
            incoming.header = parse_data_header(incoming.raw)
            incoming.targets.extend(sink.page_views(incoming.header, incoming.length - DATA_HEADER.size))
            self._stage = _Stage.PAGES
            return None
        body = incoming.header if incoming.kind is FrameType.DATA and incoming.header else incoming.raw
        incoming.length, incoming.since_s = 0, None
        self._expect(_Stage.HEADER, HEADER.size)
        return incoming.kind, body

    # ---------------------------------------------------------------- end
    def end_output(self) -> None:
        """Tell the peer that we say no more, and go on reading until it closes."""
        self._out.clear()
        self._out_bytes = 0
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)  # that of TLS would let plain text through

    def discard(self) -> None:
        """Read and throw away. Raises EOFError or OSError when the peer has closed."""
        with contextlib.suppress(BlockingIOError):
            while socket.socket.recv(self._sock, 1 << 16):  # below TLS, which may have failed
                pass
            raise EOFError("closed by the peer")

    def close(self) -> None:
        """Close at once. Queued frames are lost, page views are let go, descriptors nobody took are closed."""
        self._out.clear()
        self._out_bytes = 0
        self._in.targets.clear()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self._sock.close()
