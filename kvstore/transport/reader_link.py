"""One connection from a writer elsewhere to this receiver: greet, then frames, then an end that proves something.

GREETING ──PROOF right──▶ OPEN ──EOF──▶ closed: nothing of this writer can land any more
                           └─ bad frame: tcp and rdma are closed at once (only we write our memory, or the queue
                              pair is destroyed with our agent, before anybody hears of the close);
                              shm goes to DRAINING: the writer still has our pages mapped, so what it holds stays
                              quarantined until it closes its end or exits (EOF of a socket that only it holds)
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

import msgspec

from kvstore.reshard.plan import HeadShare
from kvstore.transport.connection import Connection
from kvstore.transport.errors import BadFrame, HandshakeRefused, RdmaError
from kvstore.transport.frames import DataHeader, FrameType, Hello, Proof, Reject, Welcome, frame, parse_body
from kvstore.transport.handshake import ReceiverHandshake
from kvstore.transport.pages import PeerPages, pages_of
from kvstore.transport.rdma_agent import RdmaAgent
from kvstore.transport.settings import NodeContext

REJECT_DELAY_S = 0.2  # before the answer to a wrong proof: guessing is slow, and right or wrong take the same time


class ReaderPhase(Enum):
    GREETING = auto()
    REJECTED = auto()
    OPEN = auto()
    DRAINING = auto()
    CLOSED = auto()


class ReaderOwner(Protocol):
    """What a link tells its receiver."""

    def on_frame(self, link: ReaderLink, kind: FrameType, body: bytearray) -> None: ...
    def page_views(self, link: ReaderLink, header: DataHeader, num_bytes: int) -> list[memoryview]: ...
    def on_landed(self, link: ReaderLink, header: DataHeader) -> None: ...
    def admit(self, peer: str) -> None: ...
    def on_unreachable(self, link: ReaderLink) -> None: ...
    def on_closed(self, link: ReaderLink) -> None: ...


class ReaderLink:
    """Owned by the `kv` thread. `serial` names this connection, for ever: grants belong to it."""

    def __init__(self, context: NodeContext, owner: ReaderOwner, connection: Connection, serial: int) -> None:
        self.serial = serial
        self.phase = ReaderPhase.GREETING
        self.peer = ""  # the writer's incarnation, once proven
        self.pid, _ = connection.peer_credentials()
        self.protocol = connection.protocol
        self.pages: PeerPages = pages_of(context.region, None)  # where what it sends goes, once it is proven
        self.unwatch: Callable[[ReaderLink], None] = lambda _: None  # set by the owner's loop
        self._context = context
        self._owner = owner
        self._connection = connection
        self._started_s = self._last_beat_s = context.clock()
        self._reject_at_s = 0.0
        self._reject: HandshakeRefused | None = None
        self._is_silent = False
        self._agent: RdmaAgent | None = None
        # Then our close proves nothing: the writer can go on by itself.
        is_proof = context.rdma is not None and context.rdma.is_proof
        self._is_written_by_peer = self.protocol == "shm" or (self.protocol == "rdma" and not is_proof)
        self._handshake = ReceiverHandshake(
            secrets=context.secrets(),
            incarnation=context.incarnation,
            compat=context.compat,
            protocol=connection.protocol,
            layout=context.layout,
        )

    # ---------------------------------------------------------------- Handler of the loop
    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def wants_write(self) -> bool:
        return self._connection.wants_write

    def on_writable(self, now_s: float) -> None:
        try:
            self._connection.flush(now_s)
        except HandshakeRefused as error:
            self._refuse(error, now_s)
        except OSError:
            # The reading side decides: frames of the writer that are still in the socket come first.
            self._connection.end_output()

    def on_readable(self, now_s: float) -> None:
        try:
            if self.phase in (ReaderPhase.DRAINING, ReaderPhase.REJECTED):
                self._connection.discard()
                return
            for kind, body in self._connection.read(self, now_s):
                self._dispatch(kind, body)
                if self.phase not in (ReaderPhase.GREETING, ReaderPhase.OPEN):
                    return
        except BadFrame as error:
            self.fail(error)
        except HandshakeRefused as error:
            self._refuse(error, now_s)
        except RdmaError as error:
            self._refuse(HandshakeRefused(reason=error.reason, detail=error.detail), now_s)
        except (EOFError, OSError):
            self.close()

    def page_views(self, header: DataHeader, num_bytes: int) -> list[memoryview]:
        return self._owner.page_views(self, header, num_bytes)

    def _dispatch(self, kind: FrameType, body: bytearray | DataHeader) -> None:
        if isinstance(body, DataHeader):
            self._owner.on_landed(self, body)
        elif self.phase is ReaderPhase.OPEN:
            if kind is not FrameType.HEARTBEAT:
                self._owner.on_frame(self, kind, body)
        elif kind is FrameType.HELLO and self._handshake.hello is None:
            challenge = self._handshake.challenge(parse_body(kind, body, Hello))
            self.send(frame(FrameType.CHALLENGE, challenge))
        elif kind is FrameType.PROOF:
            peer = self._handshake.check(parse_body(kind, body, Proof))
            self._owner.admit(peer)
            self._open(peer)
        else:
            raise BadFrame(reason="state", detail=f"{kind.name} in the handshake")

    def _open(self, peer: str) -> None:
        region = self._context.region
        self.peer, self.phase = peer, ReaderPhase.OPEN
        self.pages = pages_of(region, self._handshake.conversion)
        shape = Welcome(region.num_blocks, region.num_layers, region.layer_bytes, self._context.layout)
        if self.protocol == "rdma":
            shape = self._with_agent(shape)
        fds = (self._context.shared.fd,) if self.protocol == "shm" else ()
        self._connection.send(frame(FrameType.WELCOME, shape), fds=fds)
        self._connection.is_greeting = False

    def _with_agent(self, shape: Welcome) -> Welcome:
        """Raises RdmaError: no_rdma, the region cannot be registered, or the peer has another layout."""
        rdma, region = self._context.rdma, self._context.region
        assert rdma is not None  # its listener was made
        if self.is_converted:
            raise RdmaError(reason="no_rdma", detail="pages of another layout are converted over shm and tcp only")
        self._agent = rdma.take_agent()
        return msgspec.structs.replace(
            shape,
            address=region.address,
            rdma_metadata=self._agent.metadata,
            segment=region.kind.segment,
            device=region.kind.device,
        )

    # ---------------------------------------------------------------- use
    @property
    def share(self) -> HeadShare | None:
        """What the peer holds of our heads, if it is not all of them."""
        conversion = self._handshake.conversion
        return None if conversion is None or conversion.is_whole else conversion.share

    @property
    def is_converted(self) -> bool:
        """The peer keeps KV in another layout than we do."""
        conversion = self._handshake.conversion
        return conversion is not None and not conversion.is_plain

    def send(self, data: bytes) -> None:
        if self.phase in (ReaderPhase.GREETING, ReaderPhase.REJECTED, ReaderPhase.OPEN):
            try:
                self._connection.send(data)
            except BadFrame as error:
                self.fail(error)

    def tick(self, now_s: float) -> None:
        """Heartbeats, handshakes that take too long, peers that went silent."""
        times, silent_s = self._context.times, now_s - self._connection.last_heard_s
        if self.phase is ReaderPhase.REJECTED:
            if self._reject is not None and now_s >= self._reject_at_s:
                self.send(frame(FrameType.REJECT, Reject(self._reject.reason, self._reject.detail[:200])))
                self._reject = None
            elif now_s - self._started_s >= times.handshake_s:
                self.close()
        elif self.phase is ReaderPhase.GREETING:
            if now_s - self._started_s >= times.handshake_s:
                self._context.reject("handshake_timeout", f"nothing sound within {times.handshake_s} s")
                self.close()
        elif self.phase is ReaderPhase.OPEN:
            if now_s - self._last_beat_s >= times.heartbeat_s:
                self._last_beat_s = now_s
                self.send(frame(FrameType.HEARTBEAT))
            if not self._is_written_by_peer and silent_s >= times.tcp_silence_s:
                self.close()  # we write no more of what may come: that is proof, silence is not
                return
            try:
                self._connection.check_pace(now_s, grace_s=times.frame_grace_s, min_bytes_per_s=times.min_bytes_per_s)
            except BadFrame as error:
                self.fail(error)
                return
            is_silent = silent_s >= times.silence_s
            if is_silent and not self._is_silent:
                self._owner.on_unreachable(self)
            self._is_silent = is_silent

    def fail(self, error: BadFrame) -> None:
        """The peer broke the protocol: end this connection, and only this one."""
        self._context.reject(error.reason, error, peer=self.peer)
        if error.reason == "version" and self.phase is ReaderPhase.GREETING:
            self._refuse(HandshakeRefused(reason="version", detail=error.detail), self._context.clock(), count=False)
        elif self._is_written_by_peer and self.phase is ReaderPhase.OPEN:
            self.phase = ReaderPhase.DRAINING
            self._connection.end_output()
            self._owner.on_unreachable(self)
        elif self.phase is not ReaderPhase.DRAINING:
            self.close()

    def close(self) -> None:
        """Nothing more is taken from this peer. Tells the owner once."""
        if self.phase is ReaderPhase.CLOSED:
            return
        self.phase = ReaderPhase.CLOSED
        self.unwatch(self)
        if self._agent is not None:
            self._agent.destroy()  # first: what is still on its way must not land in pages that are free
        self._connection.close()
        self._owner.on_closed(self)

    def _refuse(self, error: HandshakeRefused, now_s: float, *, count: bool = True) -> None:
        if count:
            self._context.reject(error.reason, error)
        self.phase, self._reject = ReaderPhase.REJECTED, error
        self._reject_at_s = now_s + (REJECT_DELAY_S if error.reason == "auth" else 0.0)
