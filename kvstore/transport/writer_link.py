"""One connection from this writer to one receiver: dial, greet, then frames both ways and jobs in order.

    DIALLING ──connected──▶ GREETING ──WELCOME──▶ OPEN          any ──error, REJECT, silence──▶ closed for good
       └─ next candidate (shm, then rdma, then tcp)

Closing it ends everything that this side could still write: there is one `kv` thread, and no copy is under way when it
closes a link; writes by rdma that are under way end with the agents, ours here and the receiver's at its EOF. That is
why a writer may close whenever it doubts, and the receiver may take EOF as proof.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from typing import Protocol

from kvstore.address import KVAddress
from kvstore.reshard.plan import Conversion
from kvstore.transport.connection import Connection
from kvstore.transport.errors import BadFrame, HandshakeRefused, RdmaError, TransportError
from kvstore.transport.frames import Challenge, DataHeader, FrameType, Reject, Welcome, frame, parse_body
from kvstore.transport.handshake import WriterHandshake, conversion_of
from kvstore.transport.memory import MemoryKind
from kvstore.transport.movers import ConvertingMover, Mover, ShmMover, TcpMover
from kvstore.transport.rdma_mover import RdmaMover
from kvstore.transport.region import KVRegion
from kvstore.transport.settings import NodeContext
from kvstore.transport.transfers import Transfer

TCP_BUFFER_BYTES = 4 << 20
TURN_S = 100e-6  # after so long a link lets the others have their turn


class LinkPhase(Enum):
    DIALLING = auto()
    GREETING = auto()
    OPEN = auto()
    CLOSED = auto()


class LinkOwner(Protocol):
    """What a link tells its writer."""

    def on_open(self, link: WriterLink) -> None: ...
    def on_frame(self, link: WriterLink, kind: FrameType, body: bytearray) -> None: ...
    def on_lost(self, link: WriterLink, reason: str) -> None: ...
    def watch(self, link: WriterLink) -> None: ...
    def unwatch(self, link: WriterLink) -> None: ...


class WriterLink:
    """Owned by the `kv` thread."""

    def __init__(self, context: NodeContext, owner: LinkOwner, target: KVAddress) -> None:
        self.target = target
        self.phase = LinkPhase.DIALLING
        self.transfers: dict[str, Transfer] = {}
        self.jobs: deque[tuple[Transfer, Iterator[None]]] = deque()
        self.first_frames: list[bytes] = []  # go out when it is open
        self.mover: Mover | None = None
        self.converter: ConvertingMover | None = None  # the mover, if the peer has another layout
        self.fault_detail = ""  # of a handshake that failed: what differs
        self.started_s = context.clock()
        self._context = context
        self._owner = owner
        self._candidates, self._no_way = _candidates(context, target)
        self._connection: Connection | None = None
        self._handshake: WriterHandshake | None = None
        self._peer_region: KVRegion | None = None
        self._last_beat_s = self.started_s

    # ---------------------------------------------------------------- dialling
    def dial(self) -> None:
        """Try the next candidate; with none left the link is lost."""
        while self._candidates:
            protocol, family, address = self._candidates.pop(0)
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            sock.setblocking(False)
            if protocol == "tcp":  # rdma sends control frames only
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TCP_BUFFER_BYTES)
            code = sock.connect_ex(address)
            if code not in (0, errno.EINPROGRESS):
                sock.close()
                continue
            self._connection = Connection(sock, protocol, self._context.clock())
            self.phase = LinkPhase.DIALLING
            self._owner.watch(self)
            if code == 0:
                self._greet(self._connection)
            return
        self.close(self._no_way or "unreachable")

    def _greet(self, connection: Connection) -> bool:
        context = self._context
        if connection.protocol == "shm" and connection.peer_credentials()[1] != os.getuid():
            self._drop_connection()  # another user's socket in our place
            self.dial()
            return False
        self.phase = LinkPhase.GREETING
        self._handshake = WriterHandshake(
            secrets=context.secrets(),
            incarnation=context.incarnation,
            target=self.target.incarnation,
            compat=context.compat,
            protocol=connection.protocol,
            layout=context.layout,
        )
        if context.tls is not None and connection.protocol != "shm":
            connection.dial_tls(context.tls, self.target.tcp_host)
        connection.expects_welcome = True
        connection.send(frame(FrameType.HELLO, self._handshake.hello))
        return True

    # ---------------------------------------------------------------- Handler of the loop
    def fileno(self) -> int:
        return -1 if self._connection is None else self._connection.fileno()

    @property
    def wants_write(self) -> bool:
        connection = self._connection
        return connection is not None and (self.phase is LinkPhase.DIALLING or connection.wants_write)

    @property
    def protocol(self) -> str:
        return "" if self._connection is None else self._connection.protocol

    def on_writable(self, now_s: float) -> None:
        connection = self._connection
        if connection is None or connection.is_closed:
            return
        if self.phase is LinkPhase.DIALLING and not self._finish_connect(connection):
            return
        try:
            connection.flush(now_s)
        except HandshakeRefused as error:
            self._refused(error)
        except OSError as error:
            self.close(f"channel_lost: {error.strerror}")

    def on_readable(self, now_s: float) -> None:
        connection = self._connection
        if connection is None or (self.phase is LinkPhase.DIALLING and not self._finish_connect(connection)):
            return
        try:
            for kind, body in connection.read(self, now_s):
                assert not isinstance(body, DataHeader)  # page_views lets no DATA through
                self._dispatch(kind, body)
                if self.phase is LinkPhase.CLOSED:
                    return
        except TransportError as error:
            self._refused(error)
        except (EOFError, OSError) as error:
            self.close(f"channel_lost: {error}")

    def page_views(self, header: DataHeader, num_bytes: int) -> list[memoryview]:
        raise BadFrame(reason="state", detail=f"DATA of {num_bytes} bytes from a receiver ({header})")

    def _finish_connect(self, connection: Connection) -> bool:
        """True if connected. Else the next candidate is tried, or the attempt goes on."""
        result = connection.connect_result()
        if result is None:
            return False
        if result == 0:
            return self._greet(connection)
        self._drop_connection()
        self.dial()
        return False

    def _dispatch(self, kind: FrameType, body: bytearray) -> None:
        if kind is FrameType.REJECT:
            reject = parse_body(kind, body, Reject)
            raise HandshakeRefused(reason=reject.reason, detail=reject.detail)
        if self.phase is LinkPhase.OPEN:
            if kind is not FrameType.HEARTBEAT:
                self._owner.on_frame(self, kind, body)
            return
        assert self._handshake is not None
        if kind is FrameType.CHALLENGE:
            proof = self._handshake.prove(parse_body(kind, body, Challenge))
            self.send(frame(FrameType.PROOF, proof))
        elif kind is FrameType.WELCOME:
            self._open(parse_body(kind, body, Welcome))
        else:
            raise BadFrame(reason="state", detail=f"{kind.name} in the handshake")

    def _open(self, welcome: Welcome) -> None:
        connection, region = self._connection, self._context.region
        assert connection is not None
        conversion = conversion_of(self._context.layout, welcome.layout, connection.protocol)
        ours = conversion.destination if conversion is not None else region
        expected = (ours.num_layers, ours.layer_bytes)
        if (welcome.num_layers, welcome.layer_bytes) != expected:
            found = f"receiver's region has {welcome.num_layers} layers of {welcome.layer_bytes} bytes"
            raise HandshakeRefused(reason="layout", detail=f"{found}, expected {expected[0]} of {expected[1]}")
        if connection.protocol == "shm":
            if len(connection.fds) != 1:
                raise BadFrame(reason="state", detail=f"WELCOME with {len(connection.fds)} descriptors")
            shape = {name: getattr(welcome, name) for name in ("num_blocks", "num_layers", "layer_bytes")}
            self._peer_region = KVRegion.attach(connection.fds.pop(), **shape)
        is_plain = conversion is None or conversion.is_plain
        if conversion is not None and not is_plain:
            if connection.protocol == "rdma":
                raise RdmaError(reason="no_rdma", detail="KV of another layout is converted for shm and tcp only")
            self.mover = self.converter = _converter(self._context.shared, self._peer_region, connection, conversion)
        elif self._peer_region is not None:
            self.mover = ShmMover(self._context.shared, self._peer_region, connection)
        elif connection.protocol == "rdma":
            self.mover = self._rdma_mover(welcome)
        else:
            self.mover = TcpMover(self._context.shared, connection)
        connection.is_greeting = False
        connection.last_heard_s = self._context.clock()  # registering for rdma may have taken longer than silence may
        self.num_peer_blocks = welcome.num_blocks
        self.phase = LinkPhase.OPEN
        self._owner.on_open(self)

    def _rdma_mover(self, welcome: Welcome) -> RdmaMover:
        """Raises RdmaError: no_rdma, the peer's metadata cannot be used."""
        context = self._context
        assert context.rdma is not None  # or it were no candidate
        agent = context.rdma.take_agent()
        try:
            agent.connect(welcome.rdma_metadata, MemoryKind(welcome.segment, welcome.device))
        except RdmaError:
            agent.destroy()
            raise
        return RdmaMover(
            agent,
            context.region,
            peer_address=welcome.address,
            pacer=context.rdma.pacer,
            clock=context.clock,
            stall_s=2 * context.times.silence_s,  # later than silence, which names a peer that has stopped
        )

    def _fall_back(self, error: TransportError) -> None:
        assert self._context.rdma is not None
        self._context.counters["rdma_fallbacks"] += 1
        self._context.rdma.failed(self.target.incarnation, error, is_final=True)
        self._drop_connection()
        self.dial()

    def _refused(self, error: TransportError) -> None:
        """By this side or the other: the reason is counted, and told to the engine."""
        reason = getattr(error, "reason", "region")
        if reason == "no_rdma" and self._candidates:
            self._fall_back(error)
            return
        self._context.reject(reason, error, peer=self.target.incarnation)
        self.fault_detail = getattr(error, "detail", "")
        self.close(reason)

    # ---------------------------------------------------------------- use
    def num_dst_blocks(self, transfer: Transfer) -> int:
        """Blocks of the receiver's size to ask it for."""
        if self.converter is None:
            return transfer.num_blocks
        conversion = self.converter.conversion
        return conversion.blocks_for(transfer.num_tokens or transfer.num_blocks * conversion.source.block_size)

    def send(self, data: bytes) -> None:
        """Queue a frame; a peer that reads nothing loses the link."""
        if self._connection is None or self.phase is LinkPhase.CLOSED:
            return
        try:
            self._connection.send(data)
        except BadFrame as error:
            self.close(error.reason)

    @property
    def num_queued_bytes(self) -> int:
        """Bytes that the peer's kernel has not been given yet."""
        return 0 if self._connection is None else self._connection.num_queued_bytes

    def is_sending(self, xfer: str) -> bool:
        return self.is_landing(xfer) or (self._connection is not None and self._connection.is_sending(xfer))

    def is_landing(self, xfer: str) -> bool:
        """Whether it is too early to tell the receiver that a transfer is closed, even behind all frames."""
        return self.mover is not None and self.mover.is_landing(xfer)

    @property
    def is_quick(self) -> bool:
        """Nothing waits here, and the next job is a copy.

        Over tcp it is a frame whose receiver may wake on this core, in the way of the commit that follows: slower than
        both in one turn of the `kv` thread. Agents of rdma are for one thread.
        """
        return self.protocol == "shm" and self.converter is None and not self.jobs and not self.num_queued_bytes

    def drop_jobs(self, transfer: Transfer) -> None:
        """Nothing more of this transfer is started. A DATA frame that is half sent is finished, from a copy."""
        self.jobs = deque(job for job in self.jobs if job[0] is not transfer)
        if self._connection is not None:
            self._connection.drop_unsent(transfer.xfer)

    def work(self) -> bool:
        """Jobs in order, for one turn of the loop: one large slice, or all of a small transfer.

        True if there is more to do now.
        """
        ends_s, has_moved = self._context.clock() + TURN_S, False
        try:
            while self.mover is not None and self.mover.is_ready() and self.jobs:
                if self._context.clock() >= ends_s:
                    return True
                self._step(*self.jobs[0])
                has_moved = True
        except BadFrame as error:
            self.close(error.reason)
        except RdmaError as error:
            assert self._context.rdma is not None
            self._context.rdma.failed(self.target.incarnation, error, is_final=False)
            self._context.counters["rdma_failures"] += 1
            self.close(error.reason)
        # A window that is full by what was moved in this turn may be empty at its end: look again.
        return has_moved and bool(self.jobs)

    def _step(self, transfer: Transfer, job: Iterator[None]) -> None:
        start_s = self._context.clock()
        is_done = next(job, StopIteration) is StopIteration
        if is_done and self.jobs and self.jobs[0][1] is job:
            self.jobs.popleft()
        transfer.busy_s += self._context.clock() - start_s

    def tick(self, now_s: float) -> None:
        """Heartbeats; close a link that does not come up, or has gone silent."""
        connection, times = self._connection, self._context.times
        if self.phase is LinkPhase.CLOSED or connection is None:
            return
        if self.phase is not LinkPhase.OPEN:
            if now_s - self.started_s >= times.handshake_s:
                self.close("handshake_timeout")
            return
        if now_s - connection.last_heard_s >= times.silence_s:
            self.close("silent")
            return
        try:
            connection.check_pace(now_s, grace_s=times.frame_grace_s, min_bytes_per_s=times.min_bytes_per_s)
        except BadFrame as error:
            self._refused(error)
            return
        if now_s - self._last_beat_s >= times.heartbeat_s:
            self._last_beat_s = now_s
            self.send(frame(FrameType.HEARTBEAT))

    def close(self, reason: str) -> None:
        """Nothing is written after this. Tells the owner once."""
        if self.phase is LinkPhase.CLOSED:
            return
        self.phase = LinkPhase.CLOSED
        self.jobs.clear()
        if self.mover is not None:
            self.mover.close()
        self.mover = self.converter = None  # they see the peer's pages
        self._drop_connection()
        if self._peer_region is not None:
            self._peer_region.close()
        self._owner.on_lost(self, reason)

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._owner.unwatch(self)
            self._connection.close()
            self._connection = None


def _converter(own: KVRegion, peer: KVRegion | None, connection: Connection, conversion: Conversion) -> ConvertingMover:
    """With `peer`, its mapping, over shm; else over tcp."""
    from kvstore.transport.converting import ConvertingShmMover, ConvertingTcpMover  # numpy: only for unlike pairs

    if peer is None:
        return ConvertingTcpMover(own, connection, conversion)
    return ConvertingShmMover(own, peer, conversion)


def _candidates(
    context: NodeContext, target: KVAddress
) -> tuple[list[tuple[str, socket.AddressFamily, str | tuple[str, int]]], str]:
    """Ways to the target, best first; and why there is none, where that has a name."""
    no_way = ""
    family = socket.AF_INET6 if ":" in target.tcp_host else socket.AF_INET
    found: list[tuple[str, socket.AddressFamily, str | tuple[str, int]]] = []
    if "shm" in context.protocols and target.unix_path and target.host_id == context.host_id:
        found.append(("shm", socket.AF_UNIX, target.unix_path))
    is_tcp = "tcp" in context.protocols and bool(target.tcp_port)
    if context.rdma is not None:
        misfit = context.rdma.misfit(target.incarnation, target.rdma_version, can_be_avoided=is_tcp)
        if not misfit:
            found.append(("rdma", family, (target.tcp_host, target.rdma_port)))
        elif not is_tcp:
            no_way = f"no_rdma: {misfit}"
        elif not found:
            context.rdma.failed(target.incarnation, misfit, is_final=True)
            context.counters["rdma_fallbacks"] += 1
    if is_tcp:
        found.append(("tcp", family, (target.tcp_host, target.tcp_port)))
    return found, no_way
