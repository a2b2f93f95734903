"""Inside the guest: pages go from one process to another over soft-RoCE, by the transport that workers use.

    python -m tests.rdma.push_pages            the receiver; starts the writer, prints a line per check, leaves with 0
    python -m tests.rdma.push_pages <address>  the writer
Every byte is compared; the packet counter of the device proves that it was RDMA; then the writer is killed in the
middle, and nothing may land in pages that have come back.
"""

from __future__ import annotations

import faulthandler
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from kvstore.address import KVAddress
from kvstore.readable import wait_readable
from kvstore.transport import (
    Arrived,
    BlocksFree,
    Event,
    GrantReceived,
    Handed,
    KVNode,
    KVRegion,
    PushFailed,
    ReserveRequested,
    Times,
)

NUM_BLOCKS: Final = 16
NUM_LAYERS: Final = 4
LAYER_BYTES: Final = 64 << 10
SEED: Final = 11
STEP_S: Final = 180.0
SENT_PACKETS: Final = Path("/sys/class/infiniband/rxe0/ports/1/hw_counters/sent_pkts")
MAX_PAYLOAD: Final = 4096  # of a packet: the largest MTU that RoCE knows
# An emulated machine is slow; nothing here is about time.
TIMES: Final = Times(
    silence_s=60.0, tcp_silence_s=120.0, handshake_s=120.0, reserve_s=120.0, commit_s=120.0, grant_lease_s=120.0
)
E = TypeVar("E", bound=Event)


def make_node(name: str) -> tuple[KVNode, KVRegion]:
    region = KVRegion.create(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
    node = KVNode(
        incarnation=name, region=region, secret=b"guest", compat="guest", protocols=("rdma",), times=TIMES
    )  # fmt: skip
    return node, region


def wait(node: KVNode, kind: type[E]) -> E:
    ends_s = time.monotonic() + STEP_S
    while time.monotonic() < ends_s:
        for event in node.poll_events():
            if isinstance(event, kind):
                return event
            if isinstance(event, PushFailed):
                raise SystemExit(f"FAIL: {event}")
        wait_readable([node.wake_fd], 0.5)
    raise SystemExit(f"FAIL: no {kind.__name__} within {STEP_S:.0f} s")


def pages(seed: int) -> bytes:
    return random.Random(seed).randbytes(NUM_BLOCKS * NUM_LAYERS * LAYER_BYTES)


def write(address: str) -> None:
    node, region = make_node("guest-writer")
    region.buffer[:] = pages(SEED)
    target = msgspec.json.decode(address, type=KVAddress)
    node.start()
    print("guest: writer is up", flush=True)
    blocks = list(range(NUM_BLOCKS))
    for xfer in ("w:whole", "w:killed"):
        node.reserve(target, xfer, rid=xfer, epoch=1, token="t", num_blocks=NUM_BLOCKS, deadline_s=STEP_S)
        wait(node, GrantReceived)
        print(f"guest: {xfer} is granted", flush=True)
        if xfer == "w:killed":
            break
        for layer in range(NUM_LAYERS):
            node.push(xfer, [(block, block) for block in blocks], layer, layer + 1)
        node.commit(xfer, src_blocks=blocks, num_tokens=NUM_BLOCKS, state=b"s")
        wait(node, Handed)
    for _ in range(200):  # more than can be sent until the kill
        node.push("w:killed", [(block, block) for block in blocks], 0, NUM_LAYERS)
    time.sleep(STEP_S)


def read() -> None:
    node, region = make_node("guest-reader")
    address = msgspec.json.encode(node.start()).decode()
    print("guest: receiver is up:", address, flush=True)
    packets = int(SENT_PACKETS.read_text())
    with subprocess.Popen([sys.executable, "-m", "tests.rdma.push_pages", address]) as writer:
        try:
            _check_whole(node, region, packets)
            _check_kill(node, region, writer)
        finally:
            writer.kill()
    node.stop()
    print("PASS", flush=True)
    sys.stdout.flush()
    os._exit(0)  # UCX may crash in the interpreter's teardown


def _check_whole(node: KVNode, region: KVRegion, packets: int) -> None:
    order = list(range(NUM_BLOCKS))
    random.Random(SEED).shuffle(order)
    node.grant(wait(node, ReserveRequested), order)
    arrived = wait(node, Arrived)
    sent = pages(SEED)
    size = region.block_bytes
    wrong = [dst for src, dst in enumerate(order) if region.block(dst) != sent[src * size : (src + 1) * size]]
    if wrong:
        raise SystemExit(f"FAIL: blocks {wrong} differ")
    num_packets = int(SENT_PACKETS.read_text()) - packets
    if num_packets < region.num_bytes // MAX_PAYLOAD:
        raise SystemExit(f"FAIL: only {num_packets} packets over the device for {region.num_bytes} bytes")
    node.settle(arrived.xfer, True)
    rate = arrived.num_bytes / arrived.transfer_s / 1e6
    print(f"guest: {arrived.num_bytes} bytes equal, {num_packets} packets, {rate:.1f} MB/s", flush=True)


def _check_kill(node: KVNode, region: KVRegion, writer: subprocess.Popen[bytes]) -> None:
    request = wait(node, ReserveRequested)
    region.buffer[:] = bytes(region.num_bytes)
    node.grant(request, list(range(NUM_BLOCKS)))
    ends_s = time.monotonic() + STEP_S
    while not any(region.block(0)):
        if time.monotonic() >= ends_s:
            raise SystemExit("FAIL: nothing of the second transfer has landed")
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    wait(node, BlocksFree)
    region.buffer[:] = bytes(region.num_bytes)
    time.sleep(3.0)
    if hashlib.sha256(region.buffer).digest() != hashlib.sha256(bytes(region.num_bytes)).digest():
        raise SystemExit("FAIL: pages were written after they had come back")
    print("guest: killed in the middle of a push; nothing has landed since its pages came back", flush=True)


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60.0, repeat=True)  # where it hangs, if it does
    if len(sys.argv) > 1:
        write(sys.argv[1])
    else:
        read()
