"""Two nodes in one process, a second process, and waiting for events; for the transport tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest

from kvstore.address import KVAddress
from kvstore.readable import wait_readable
from kvstore.reshard import KVLayout
from kvstore.transport import Event, GrantReceived, KVNode, KVRegion, ReserveRequested, Times
from kvstore.transport.rdma import nixl_version
from kvstore.transport.tls import TlsFiles
from tests.contract.transport_peer import COMPAT, LAYER_BYTES, NUM_BLOCKS, NUM_LAYERS, SECRET

ROOT = Path(__file__).parents[2]
needs_nixl = pytest.mark.skipif(not nixl_version(), reason="nixl-cu12 is not installed (extra rdma)")
PROTOCOLS = ("shm", "tcp", pytest.param("rdma", marks=needs_nixl))
E = TypeVar("E", bound=Event)


def wait_for(claim: Callable[[], object], *, what: str, timeout_s: float = 10.0) -> None:
    """Poll `claim` until it holds."""
    ends_s = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < ends_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)


class End:
    """One node, its region, and all events so far."""

    def __init__(
        self,
        name: str,
        run_dir: str,
        protocols: Sequence[str],
        *,
        secret: bytes | Callable[[], Sequence[bytes]] = SECRET,
        compat: str = COMPAT,
        times: Times | None = None,
        tls: TlsFiles | None = None,
        layout: KVLayout | None = None,
    ) -> None:
        num_layers, layer_bytes = (layout.num_layers, layout.layer_bytes) if layout else (NUM_LAYERS, LAYER_BYTES)
        self.region = KVRegion.create(NUM_BLOCKS, num_layers, layer_bytes)
        self.node = KVNode(
            incarnation=name,
            region=self.region,
            secret=secret,
            compat=compat,
            protocols=protocols,
            run_dir=run_dir,
            times=times,
            tls=tls,
            layout=layout,
        )
        self.address = self.node.start()
        self.events: list[Event] = []
        self._num_seen = 0

    def wait(self, kind: type[E], *, timeout_s: float = 10.0) -> E:
        """The next event of this kind; others are skipped."""
        ends_s = time.monotonic() + timeout_s
        while True:
            self.events += self.node.poll_events()
            while self._num_seen < len(self.events):
                event = self.events[self._num_seen]
                self._num_seen += 1
                if isinstance(event, kind):
                    return event
            left_s = ends_s - time.monotonic()
            assert left_s > 0, f"no {kind.__name__} within {timeout_s} s, but {self.events}"
            wait_readable([self.node.wake_fd], left_s)

    def sees(self, kind: type[Event], *, within_s: float) -> bool:
        """Whether such an event comes in this time."""
        try:
            self.wait(kind, timeout_s=within_s)
        except AssertionError:
            return False
        return True

    def reserve(
        self, target: KVAddress, xfer: str, num_blocks: int, *, deadline_s: float = 60.0, num_tokens: int = 0
    ) -> None:
        self.node.reserve(
            target,
            xfer,
            rid=f"rid-{xfer}",
            epoch=3,
            token="tok",
            num_blocks=num_blocks,
            deadline_s=deadline_s,
            num_tokens=num_tokens,
        )

    def hold_kv_thread(self) -> Callable[[], None]:
        """The `kv` thread does nothing until what is returned is called, or for 5 s."""
        is_held, may_go = threading.Event(), threading.Event()

        def hold() -> None:
            is_held.set()
            may_go.wait(5)

        self.node._loop.post(hold)
        assert is_held.wait(5)
        return may_go.set

    def close(self) -> None:
        self.node.stop()
        self.region.close()


def granted(writer: End, reader: End, xfer: str, blocks: list[int]) -> None:
    """Reserve and grant; both sides know it afterwards."""
    writer.reserve(reader.address, xfer, len(blocks))
    reader.node.grant(reader.wait(ReserveRequested), blocks)
    writer.wait(GrantReceived)


def fill(region: KVRegion) -> None:
    region.buffer[:] = os.urandom(region.num_bytes)


class FlippingRelay:
    """Passes one tcp connection on to `port`, with one bit of what the caller sends the other way round. A context."""

    def __init__(self, port: int, *, at_byte: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._target = port
        self._at_byte = at_byte
        self._socks: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> FlippingRelay:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._listener, *self._socks):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        caller, _ = self._listener.accept()
        target = socket.create_connection(("127.0.0.1", self._target))
        self._socks += [caller, target]
        answers = threading.Thread(target=self._pump, args=(target, caller, -1), daemon=True)
        self._threads.append(answers)
        answers.start()
        self._pump(caller, target, self._at_byte)

    def _pump(self, source: socket.socket, sink: socket.socket, at_byte: int) -> None:
        num_bytes = 0
        with contextlib.suppress(OSError):
            while chunk := bytearray(source.recv(1 << 16)):
                if 0 <= at_byte - num_bytes < len(chunk):
                    chunk[at_byte - num_bytes] ^= 1
                num_bytes += len(chunk)
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)


class Child:
    """A `transport_peer` process. Use as a context; it is killed at the end."""

    def __init__(self, role: str, protocol: str, run_dir: str, target: KVAddress | None = None) -> None:
        command = [sys.executable, "-m", "tests.contract.transport_peer", role, protocol, run_dir]
        if target is not None:
            command.append(msgspec.json.encode(target).decode())
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert self._process.stdout is not None
        self.pid = self._process.pid
        self.address = msgspec.json.decode(self._process.stdout.readline(), type=KVAddress)

    def tell(self, word: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()

    def read_event(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
