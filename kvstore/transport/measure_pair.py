"""Nodes of two processes for measuring: a writer here, readers in a process of their own.

    python -m kvstore.transport.measure_pair <folder> <name> <specs as JSON>     the reader
One memfd serves all nodes of a process: a node differs in protocol, checksum and layout of its blocks, not in bytes.
Names of writers begin with w.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from typing import Final

import msgspec

from kvstore.address import KVAddress
from kvstore.readable import wait_readable
from kvstore.reshard import KVLayout
from kvstore.transport.events import Arrived, Event, GrantReceived, Handed, PushFailed, Refused, ReserveRequested
from kvstore.transport.node import KVNode
from kvstore.transport.region import KVRegion

SECRET: Final = b"measure"
STEP_TIMEOUT_S: Final = 20.0
SEED: Final = 7


class NodeSpec(msgspec.Struct, frozen=True, array_like=True):
    """One node. `is_scattered`: blocks in a random order at both ends, so that no two neighbours join."""

    name: str
    protocol: str
    block_bytes: int
    num_blocks: int
    has_checksum: bool
    is_scattered: bool
    layouts: tuple[KVLayout, KVLayout] | None = None  # of the writer and the reader; `num_blocks` are the writer's
    num_tokens: int = 0

    def layout(self, side: str) -> KVLayout | None:
        if self.layouts is None:
            return None
        return self.layouts[0 if side.startswith("w") else 1]

    def num_bytes(self, side: str) -> int:
        """Of the region."""
        layout = self.layout(side)
        if layout is None:
            return self.num_blocks * self.block_bytes
        return -(-self.num_tokens // layout.block_size) * layout.num_layers * layout.layer_bytes


class Memory:
    """The bytes of all nodes of a process."""

    def __init__(self, num_bytes: int) -> None:
        self.whole = KVRegion.create(1, 1, num_bytes)

    def region(self, spec: NodeSpec, side: str) -> KVRegion:
        fd, layout = os.dup(self.whole.fd), spec.layout(side)
        if layout is None:
            return KVRegion(fd, num_blocks=spec.num_blocks, num_layers=1, layer_bytes=spec.block_bytes)
        num_blocks = -(-spec.num_tokens // layout.block_size)
        return KVRegion(fd, num_blocks=num_blocks, num_layers=layout.num_layers, layer_bytes=layout.layer_bytes)

    def node(self, spec: NodeSpec, *, side: str, folder: str) -> KVNode:
        return KVNode(
            incarnation=f"{side}-{spec.name}",
            region=self.region(spec, side),
            layout=spec.layout(side),
            secret=SECRET,
            compat=spec.name,
            protocols=(spec.protocol,),
            run_dir=folder,
            checksum=spec.has_checksum,
        )


class ReaderProcess:
    """Takes everything that it is offered. Use as a context; ends with its stdin."""

    def __init__(self, specs: list[NodeSpec], *, folder: str, name: str) -> None:
        command = [sys.executable, "-m", "kvstore.transport.measure_pair", folder, name]
        command.append(msgspec.json.encode(specs).decode())
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._child.stdout is not None
        addresses = msgspec.json.decode(self._child.stdout.readline(), type=list[KVAddress])
        self.addresses = {spec.name: address for spec, address in zip(specs, addresses, strict=True)}

    def arrived_s(self) -> float:
        """`time.monotonic()` at which the reader's engine thread heard of the last small transfer."""
        assert self._child.stdout is not None
        return float(self._child.stdout.readline())

    def __enter__(self) -> ReaderProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(STEP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()


class Writer:
    """One node here and the reader that it pushes to."""

    def __init__(self, memory: Memory, spec: NodeSpec, reader: ReaderProcess, *, side: str, folder: str) -> None:
        self.spec = spec
        self._reader = reader
        self._target = reader.addresses[spec.name]
        self._node = memory.node(spec, side=side, folder=folder)
        self._node.start()
        self._num_transfers = 0
        self._order = list(range(spec.num_blocks))
        if spec.is_scattered:
            random.Random(SEED).shuffle(self._order)

    def reserve(self, num_blocks: int, *, kind: str = "bulk") -> str:
        """A new transfer that has its grant."""
        self._num_transfers += 1
        xfer = f"{kind}:{self.spec.name}:{self._num_transfers}"
        self._node.reserve(
            self._target,
            xfer,
            rid=xfer,
            epoch=1,
            token="t",
            num_blocks=num_blocks,
            deadline_s=STEP_TIMEOUT_S,
            num_tokens=self.spec.num_tokens if num_blocks == self.spec.num_blocks else 0,
        )
        self._wait(GrantReceived)
        return xfer

    def begin_all(self, xfer: str) -> float:
        """Push and commit all blocks. Returns the time of the call."""
        blocks = self._order
        start_s = time.monotonic()
        self._node.push(xfer, [(block, place) for place, block in enumerate(blocks)], 0, self._node.num_layers)
        self._node.commit(xfer, src_blocks=blocks, num_tokens=self.spec.num_tokens or len(blocks), state=b"")
        return start_s

    def end(self) -> float:
        """Wait for the hand-over; returns when it was heard."""
        self._wait(Handed)
        return time.monotonic()

    def push_all(self) -> float:
        """Seconds from the push to the hand-over of all blocks, the grant before it not counted."""
        start_s = self.begin_all(self.reserve(self.spec.num_blocks))
        return self.end() - start_s

    def push_few(self, num_blocks: int) -> float:
        """Seconds from the push of some blocks until the reader's engine thread has heard that they are there."""
        xfer = self.reserve(num_blocks, kind="small")
        blocks = list(range(num_blocks))
        start_s = time.monotonic()
        self._node.push(xfer, [(block, block) for block in blocks], 0, 1)
        self._node.commit(xfer, src_blocks=blocks, num_tokens=num_blocks, state=b"")
        heard_s = self._reader.arrived_s()
        self.end()
        return heard_s - start_s

    def close(self) -> None:
        self._node.stop()

    def _wait(self, kind: type[Event]) -> None:
        ends_s = time.monotonic() + STEP_TIMEOUT_S
        while time.monotonic() < ends_s:
            for event in self._node.poll_events():
                if isinstance(event, kind):
                    return
                if isinstance(event, PushFailed | Refused):
                    raise RuntimeError(f"{self.spec.name}: {event}")
            wait_readable([self._node.wake_fd], 0.1)
        raise TimeoutError(f"{self.spec.name}: no {kind.__name__} within {STEP_TIMEOUT_S} s")


def _read(folder: str, name: str, specs: list[NodeSpec]) -> None:
    memory = Memory(max(spec.num_bytes(name) for spec in specs))
    nodes: dict[int, tuple[NodeSpec, KVNode]] = {}
    addresses = []
    stdin = sys.stdin.fileno()
    for spec in specs:
        node = memory.node(spec, side=name, folder=folder)
        addresses.append(node.start())
        nodes[node.wake_fd] = (spec, node)
    print(msgspec.json.encode(addresses).decode(), flush=True)
    while True:
        readable = wait_readable([*nodes, stdin])
        if stdin in readable:
            for _, node in nodes.values():
                node.stop()
            return
        for fd in readable:
            _serve(*nodes[fd])


def _serve(spec: NodeSpec, node: KVNode) -> None:
    for event in node.poll_events():
        match event:
            case ReserveRequested():
                blocks = list(range(event.num_blocks))
                if spec.is_scattered:
                    random.Random(SEED + 1).shuffle(blocks)
                node.grant(event, blocks)
            case Arrived():
                heard_s = time.monotonic()  # one clock for all processes of a machine
                node.settle(event.xfer, True)
                if event.xfer.startswith("small:"):
                    print(heard_s, flush=True)


if __name__ == "__main__":
    _read(sys.argv[1], sys.argv[2], msgspec.json.decode(sys.argv[3], type=list[NodeSpec]))
