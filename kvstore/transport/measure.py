"""How fast this machine moves KV between two processes, per transport; what `celeriac doctor` prints.

The other process is `python -m kvstore.transport.measure`, which takes everything it is offered until its stdin closes.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from kvstore.address import KVAddress
from kvstore.readable import wait_readable
from kvstore.transport.events import Arrived, BlocksFree, Event, GrantReceived, Handed, ReserveRequested
from kvstore.transport.node import KVNode
from kvstore.transport.port import KVPort
from kvstore.transport.region import KVRegion

BLOCK_BYTES = 1 << 20
NUM_BLOCKS = 32
SECRET = b"measure"
STEP_TIMEOUT_S = 5.0
E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class LinkSpeed:
    """Of contiguous blocks, without checksum. `memcpy_ratio` compares with memmove in this process, same minute."""

    protocol: str
    gigabytes_per_s: float
    memcpy_ratio: float
    num_bytes: int


def measure_links(protocols: tuple[str, ...] = ("shm", "tcp"), *, seconds: float = 0.5) -> list[LinkSpeed]:
    """Move blocks to a second process for about `seconds` per transport.

    Raises:
        TimeoutError: the other process did not answer within 5 s.
    """
    with tempfile.TemporaryDirectory(prefix="celeriac-kv-") as folder:
        return [_measure(protocol, folder, seconds) for protocol in protocols]


def _measure(protocol: str, folder: str, seconds: float) -> LinkSpeed:
    region = _region()
    node = _node(f"writer-{protocol}", region, protocol, folder)
    command = [sys.executable, "-m", "kvstore.transport.measure", protocol, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None and child.stdin is not None
            target = msgspec.json.decode(child.stdout.readline(), type=KVAddress)
            node.start()
            _round(node, target, "warm")  # both sides touch their pages once
            best_s, num_bytes, ends_s = float("inf"), 0, time.monotonic() + seconds
            while time.monotonic() < ends_s:
                best_s = min(best_s, _round(node, target, str(num_bytes)))
                num_bytes += region.num_bytes
            speed = region.num_bytes / best_s
            return LinkSpeed(protocol, speed / 1e9, speed / _memcpy_bytes_per_s(region), num_bytes)
        finally:
            node.stop()
            child.kill()


def _round(node: KVNode, target: KVAddress, name: str) -> float:
    """Seconds from the first push to the answer of the commit."""
    xfer = f"measure:{name}"
    node.reserve(target, xfer, rid=name, epoch=1, token="t", num_blocks=NUM_BLOCKS, deadline_s=STEP_TIMEOUT_S)
    wait_for(node, GrantReceived)
    start_s = time.perf_counter()
    node.push(xfer, [(block, block) for block in range(NUM_BLOCKS)], 0, 1)
    node.commit(xfer, src_blocks=list(range(NUM_BLOCKS)), num_tokens=NUM_BLOCKS, state=b"")
    wait_for(node, Handed)
    return time.perf_counter() - start_s


def wait_for(node: KVPort, kind: type[E], *, timeout_s: float = STEP_TIMEOUT_S) -> E:
    """The next event of this kind; others that come with it or before it are dropped.

    Raises:
        TimeoutError: none came.
    """
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        for event in node.poll_events():
            if isinstance(event, kind):
                return event
        wait_readable([node.wake_fd], 0.1)
    raise TimeoutError(f"no {kind.__name__} from the other side within {timeout_s} s")


def _memcpy_bytes_per_s(region: KVRegion) -> float:
    other, best_s = _region(), float("inf")
    for _ in range(4):
        start_s = time.perf_counter()
        ctypes.memmove(other.address, region.address, region.num_bytes)
        best_s = min(best_s, time.perf_counter() - start_s)
    other.close()
    return region.num_bytes / best_s


def _region() -> KVRegion:
    return KVRegion.create(NUM_BLOCKS, 1, BLOCK_BYTES)


def _node(name: str, region: KVRegion, protocol: str, folder: str) -> KVNode:
    return KVNode(
        incarnation=name,
        region=region,
        secret=SECRET,
        compat="measure",
        protocols=(protocol,),
        run_dir=folder,
        checksum=False,
    )


def _serve(protocol: str, folder: str) -> None:
    """The receiving process: every block is free again as soon as it has arrived. Ends with EOF on stdin."""
    node = _node(f"reader-{protocol}", _region(), protocol, folder)
    print(msgspec.json.encode(node.start()).decode(), flush=True)
    while True:
        readable = wait_readable([node.wake_fd, sys.stdin])
        for event in node.poll_events():
            match event:
                case ReserveRequested():
                    node.grant(event, list(range(NUM_BLOCKS)))
                case Arrived():
                    node.settle(event.xfer, True)
                case BlocksFree():
                    pass
        if sys.stdin in readable:
            node.stop()
            return


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2])
