"""The KV node of one engine process: listeners, links to peers, and the `kv` thread that moves bytes.

    engine thread ── commands (deque + eventfd) ──▶ kv thread: Loop, WriterSide, ReceiverSide
                  ◀── events (deque + wake_fd) ────

What is small (a few pages, a frame) the engine thread does by itself while the kv thread sleeps: `Loop.run_here`.

No public method blocks, but `stop`. After the `kv` thread has failed, `poll_events` raises: the engine must not go on
with grants that nobody keeps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from kvstore.address import KVAddress
from kvstore.clock import Clock, now_s
from kvstore.link_report import LinkReport
from kvstore.overdue import OverdueWriter
from kvstore.reshard.layout import KVLayout
from kvstore.transport.errors import RdmaError, TransportError
from kvstore.transport.estimator import LinkEstimates
from kvstore.transport.events import Event, FetchRequested, ReserveRequested
from kvstore.transport.frames import FETCH_PREFIX, MAX_FETCH_KEYS, FetchBody, FrameType, frame
from kvstore.transport.listeners import TcpListener, UnixListener
from kvstore.transport.loop import Loop
from kvstore.transport.memory import PageMemory
from kvstore.transport.rdma_node import RdmaNode
from kvstore.transport.receiver import ReceiverSide
from kvstore.transport.region import KVRegion
from kvstore.transport.settings import NodeContext, Times, host_id
from kvstore.transport.tls import Tls, TlsFiles
from kvstore.transport.transfers import Transfer
from kvstore.transport.writer import WriterSide

logger = logging.getLogger(__name__)

MAX_ID_CHARS = 256
MAX_STATE_BYTES = 15 << 20
STOP_TIMEOUT_S = 5.0


class KVNode:
    """One per engine process. All methods are for the engine thread.

    Args:
        region: our blocks; peers write into those that are granted to them. Anything but a `KVRegion`: rdma only.
        secret: of the cluster; both ends of a link prove that they know it. Or what says, at each handshake, which ones
            are accepted, the current one first: secrets are rotated that way.
        compat: names all that must be equal at two workers; another one is refused at the handshake.
        layout: how the blocks of `region` lie in it. With a peer of another layout blocks are converted, or the link is
            refused by name; None: only peers whose layers have as many bytes.
        protocols: allowed ones of `shm`, `rdma` and `tcp`; per pair the first of them, in this order, that works.
        run_dir: where the unix socket goes.
        bind: address of the tcp listeners (that of rdma carries its control frames).
        advertise: host that peers dial instead of `bind`, such as this one's address where `bind` is 0.0.0.0.
        tls: certificates; connections to other hosts then begin with TLS, and those that do not are refused.
        link_gbps: what the network between hosts should do, until transfers have shown it; 0 takes the table's.

    Raises:
        TlsFilesError: a certificate, its key or the CA cannot be used.
        RdmaError: `rdma` is the only protocol, and it cannot be used here.
    """

    def __init__(
        self,
        *,
        incarnation: str,
        region: PageMemory,
        secret: bytes | Callable[[], Sequence[bytes]],
        compat: str,
        protocols: Sequence[str] = ("shm", "tcp"),
        run_dir: str = "",
        bind: str = "127.0.0.1",
        advertise: str = "",
        checksum: bool = True,
        tls: TlsFiles | None = None,
        link_gbps: float = 0.0,
        times: Times | None = None,
        layout: KVLayout | None = None,
        clock: Clock = now_s,
    ) -> None:
        if not secret:
            raise ValueError("the cluster secret is empty; set one (`secret`), the same for all workers")
        unknown = set(protocols) - {"shm", "rdma", "tcp"}
        if unknown or not protocols:
            raise ValueError(f"transfer protocols {list(protocols)}: expected some of shm, rdma, tcp")
        if not isinstance(region, KVRegion) and tuple(protocols) != ("rdma",):
            raise ValueError(f"transfer protocols {list(protocols)} over memory of a device: expected rdma alone")
        rdma = _rdma_node(incarnation, region, is_needed=len(protocols) == 1) if "rdma" in protocols else None
        if rdma is None:
            protocols = [protocol for protocol in protocols if protocol != "rdma"]
        if layout is not None and (layout.num_layers, layout.layer_bytes) != (region.num_layers, region.layer_bytes):
            shape = f"{region.num_layers} layers of {region.layer_bytes} bytes"
            raise ValueError(f"{layout} is not the layout of a region of {shape}")
        if layout is not None and layout.compression != "none":
            from kvstore.reshard.native import native_rows  # numpy: only where KV is compressed

            native_rows()  # here, because a `kv` thread that compiles looks dead to its peers
        self.num_layers = region.num_layers
        self.page_ops = region.ops.name  # made here: to compile it would stop the kv thread for seconds
        self.wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._events: deque[Event] = deque()
        self._has_news = False  # some of them the engine thread has not been woken for
        own_host_id = host_id()
        self._context = NodeContext(
            incarnation=incarnation,
            region=region,
            secrets=secret if callable(secret) else lambda: (secret,),
            compat=compat,
            protocols=tuple(protocols),
            checksum=checksum,
            clock=clock,
            emit=self._emit,
            times=times or Times(),
            layout=layout,
            host_id=own_host_id,
            rdma=rdma,
            tls=None if tls is None else Tls(tls),
            links=LinkEstimates(own_host_id=own_host_id, gbps=link_gbps),
        )
        self._run_dir = run_dir
        self._bind = bind
        self._advertise = advertise or bind
        self._loop = Loop(clock)
        self._writer = WriterSide(self._context, self._loop)
        self._receiver = ReceiverSide(self._context, self._loop)
        self._listeners: list[UnixListener | TcpListener] = []
        self._address: KVAddress | None = None
        self._failure: BaseException | None = None
        self._takes: Callable[[Event], bool] | None = None
        self._thread = threading.Thread(target=self._run, name="kv", daemon=True)

    # ---------------------------------------------------------------- life
    def divert(self, takes: Callable[[Event], bool]) -> None:
        """Before `start`. `takes` is asked of each event as it happens; what it takes does not come to `poll_events`.

        In the thread that does the node's work at that moment: it must not block.
        """
        self._takes = takes

    def start(self) -> KVAddress:
        """Listen and start the `kv` thread.

        Raises:
            OSError: a listener cannot be bound, or the advertised host has no address.
        """
        unix_path, tcp_port, rdma_port, context = "", 0, 0, self._context
        if "shm" in context.protocols:
            unix = UnixListener(self._receiver.accept, context.clock, run_dir=self._run_dir, name=context.incarnation)
            self._listeners.append(unix)
            unix_path = unix.path
        if "tcp" in context.protocols:
            tcp = TcpListener(self._receiver.accept, context.clock, bind=self._bind, tls=context.tls)
            self._listeners.append(tcp)
            tcp_port = tcp.port
        if context.rdma is not None:
            accept, tls = self._receiver.accept, context.tls
            control = TcpListener(accept, context.clock, bind=self._bind, tls=tls, protocol="rdma")
            self._listeners.append(control)
            rdma_port = control.port
            self._loop.add(context.rdma.pacer)
        for listener in self._listeners:
            self._loop.add(listener)
        self._thread.start()
        self._address = KVAddress(
            incarnation=context.incarnation,
            host_id=context.host_id,
            unix_path=unix_path,
            tcp_host=_numeric(self._advertise) if tcp_port or rdma_port else "",
            tcp_port=tcp_port,
            rdma_port=rdma_port,
            rdma_version=context.rdma.version if context.rdma is not None else "",
            compat=context.compat,
        )
        return self._address

    def stop(self) -> None:
        """Close all links, then the listeners. Peers see EOF; our memory stays mapped until the process ends."""
        if self.wake_fd < 0:
            return
        self._loop.post(self._loop.stop)
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            # Not in the kv thread: `post` must never write to a descriptor that has a new meaning.
            self._loop.close()
            if self._context.rdma is not None:
                self._context.rdma.close()
            os.close(self.wake_fd)
            self.wake_fd = -1

    # ---------------------------------------------------------------- writer
    def reserve(
        self,
        target: KVAddress,
        xfer: str,
        *,
        rid: str,
        epoch: int,
        token: str,
        num_blocks: int,
        deadline_s: float,
        num_tokens: int = 0,
        group: str = "",
    ) -> None:
        """Ask `target` for a grant: `GrantReceived` or `GrantRefused` follows.

        Args:
            xfer: a new id each time; one that was closed is never used again.
            num_blocks: of our size; `num_tokens` counts if the receiver's are of another. 0: as many as fill ours.
            group: the same name at all writers of one sequence, each of which holds some of the receiver's heads; like
                `xfer` a new one each time. Then the receiver's engine is asked once, and sees it arrive once.
            deadline_s: seconds from now; then the transfer is closed, whatever its state.
        """
        for name, value in (("xfer", xfer), ("rid", rid), ("token", token)):
            if not 1 <= len(value) <= MAX_ID_CHARS:
                raise ValueError(f"{name} has {len(value)} characters; expected 1 to {MAX_ID_CHARS}")
        now = self._context.clock()
        ends_s = now + self._context.times.reserve_s
        transfer = Transfer(xfer, rid, epoch, token, num_blocks, ends_s, now + deadline_s, num_tokens, group)
        self._post(lambda: self._writer.reserve(target, transfer))

    def push(self, xfer: str, pairs: list[tuple[int, int]], layer_lo: int, layer_hi: int) -> None:
        """Move layers [lo, hi) of blocks, each (own block, place in the sequence). They must not change until the end.

        Without effect when the transfer is over: its end waits in `poll_events`.
        """
        num_bytes = len(pairs) * (layer_hi - layer_lo) * self._context.region.layer_bytes
        is_quick = partial(self._writer.is_quick, xfer, num_bytes)
        self._do(is_quick, lambda: self._writer.push(xfer, pairs, layer_lo, layer_hi))

    def commit(self, xfer: str, *, src_blocks: list[int], num_tokens: int, state: bytes) -> None:
        """After all pushes: `src_blocks` fill the grant from its first place on, and hold `num_tokens` tokens."""
        if len(state) > MAX_STATE_BYTES:
            raise ValueError(f"the state of {xfer} has {len(state)} bytes; at most {MAX_STATE_BYTES} fit a COMMIT")
        blocks = list(src_blocks)
        is_quick = partial(self._writer.is_quick, xfer, 0)
        self._do(is_quick, lambda: self._writer.commit(xfer, blocks, num_tokens, state))

    def abandon(self, xfer: str) -> None:
        """Close a transfer. `SourceFree` follows when its source blocks are read no more, also if it is over."""
        self._post(lambda: self._writer.abandon(xfer))

    def fetch(self, holder: KVAddress, name: str, keys: Sequence[bytes], *, first: int) -> None:
        """Ask `holder` to push blocks [first, ...) of a prefix here: a hint.

        A `ReserveRequested` of the holder follows, or `FetchDeclined`, or nothing at all if it cannot be reached.

        Args:
            name: begins with "fetch:".
            keys: of the chain of blocks, from its start.
        """
        assert self._address is not None, "fetch before start"
        assert name.startswith(FETCH_PREFIX), name
        data = frame(FrameType.FETCH, FetchBody(name, list(keys[:MAX_FETCH_KEYS]), first, self._address))
        self._post(lambda: self._writer.fetch(holder, data))

    def decline(self, request: FetchRequested) -> None:
        """Answer a `FetchRequested` that nothing is pushed for."""
        self._post(lambda: self._receiver.decline(request.link, request.xfer))

    # ---------------------------------------------------------------- receiver
    def grant(self, request: ReserveRequested, blocks: list[int] | None, reason: str = "") -> None:
        """Answer a `ReserveRequested`, once: blocks out of the engine's pool, or None to refuse.

        They come back by `BlocksFree`, unless `settle` says that a sequence owns them.
        """
        if blocks is not None and len(blocks) != request.num_blocks:
            raise ValueError(f"{len(blocks)} blocks for {request.xfer}, which asks for {request.num_blocks}")
        self._do(_always, lambda: self._receiver.grant(request.xfer, blocks, reason))

    def settle(self, xfer: str, handed: bool) -> None:
        """After `handoff` of an `Arrived`: the blocks are a sequence's now, or they come back by `BlocksFree`.

        Before `Arrived`, `handed=False` cancels: the writer is fenced, then the blocks come back.
        """
        self._do(_always, lambda: self._receiver.settle(xfer, handed))

    # ---------------------------------------------------------------- both
    def poll_events(self) -> list[Event]:
        """All events that wait, in order; does not block.

        Raises:
            TransportError: the `kv` thread has failed; this engine must end.
        """
        self._writer.engine_seen_s = self._context.clock()
        with contextlib.suppress(OSError):
            os.eventfd_read(self.wake_fd)  # before the queue is emptied: an event that comes now wakes again
        if self._failure is not None:
            raise TransportError("the kv thread failed; restart this engine") from self._failure
        events = []
        while self._events:
            events.append(self._events.popleft())
        return events

    def grants(self) -> dict[str, int]:
        """Blocks in grants by state: LEASED, COMMITTED, QUARANTINED."""
        return dict(self._receiver.blocks_by_state)

    def overdue_writers(self) -> tuple[OverdueWriter, ...]:
        """Writers that have left FENCE unanswered for `Times.fence_kill_s`, as of the last 0.1 s."""
        return self._receiver.overdue

    def counters(self) -> dict[str, float]:
        """Totals since the start: sent_bytes, committed_bytes, hidden_bytes (of the committed ones, those that had been
        moved when the engine committed: beside its computing), arrived_bytes, links_shm, links_rdma, links_tcp,
        rdma_fallbacks (pairs that use tcp instead), rdma_failures (links that a failed write has ended); of transfers
        that were handed over: link_transfers, link_predicted_s, link_measured_s, link_error_s (sum of the differences).
        """
        return {**self._context.counters, **self._context.links.totals}

    def links(self) -> tuple[LinkReport, ...]:
        """What is known of the speed of each link of this writer, and of one to a host never met."""
        return self._context.links.reports

    def rejects(self) -> dict[str, int]:
        """`kv_reject_total` by reason."""
        return dict(self._context.rejects)

    def check_invariants(self) -> None:
        """Of the grant table, in the `kv` thread. Raises AssertionError, or TimeoutError after 5 s."""
        done = threading.Event()
        faults: list[AssertionError] = []

        def check() -> None:
            try:
                self._receiver.table.check_invariants()
            except AssertionError as error:
                faults.append(error)
            done.set()

        self._loop.post(check)
        if not done.wait(STOP_TIMEOUT_S):
            raise TimeoutError("the kv thread did not answer within 5 s")
        if faults:
            raise faults[0]

    # ---------------------------------------------------------------- private
    def _post(self, command: Callable[[], None]) -> None:
        self._writer.engine_seen_s = self._context.clock()
        self._loop.post(command)

    def _do(self, is_quick: Callable[[], bool], command: Callable[[], None]) -> None:
        """In this thread, if that is quick and the `kv` thread sleeps; else there.

        Raises:
            TransportError: it failed here, as it would have in the `kv` thread; this engine must end.
        """

        def do() -> bool:
            if not is_quick():
                return False
            command()
            return True

        self._writer.engine_seen_s = self._context.clock()
        try:
            is_done = self._loop.run_here(do, self._work)
        except BaseException as error:
            self._failure = error
            self._loop.post(self._loop.stop)
            raise TransportError("the kv node failed; restart this engine") from error
        if is_done:
            self._tell()
        else:
            self._loop.post(command)

    def _emit(self, event: Event) -> None:
        if self._takes is not None and self._takes(event):
            return
        self._events.append(event)
        self._has_news = True

    def _tell(self) -> None:
        if self._has_news:
            self._has_news = False
            with contextlib.suppress(BlockingIOError, OSError):
                os.eventfd_write(self.wake_fd, 1)

    def _run(self) -> None:
        """The `kv` thread."""
        try:
            self._loop.run(tick=self._tick, work=self._work, tell=self._tell)
            self._writer.stop()  # first: after this nothing of ours is written into a peer's pages
            self._receiver.stop()
            self._tell()
        except BaseException as error:  # told to the engine thread, which ends the process
            self._failure = error
            os.eventfd_write(self.wake_fd, 1)
        for listener in self._listeners:
            listener.close()

    def _work(self) -> bool:
        is_writing, is_verifying = self._writer.work(), self._receiver.work()
        return is_writing or is_verifying

    def _tick(self, now_s: float) -> bool:
        is_writing, is_receiving = self._writer.tick(now_s), self._receiver.tick(now_s)
        return is_writing or is_receiving


def _always() -> bool:
    return True


def _rdma_node(incarnation: str, region: PageMemory, *, is_needed: bool) -> RdmaNode | None:
    """None where it cannot be used and something else can: one line says why."""
    try:
        return RdmaNode(incarnation, region)
    except RdmaError as error:
        if is_needed:
            raise
        logger.warning("%s", error)
        return None


def _numeric(host: str) -> str:
    """Its first address. Looked up once, here: a peer's `kv` thread must not wait for a name server."""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
