"""One end of a KV link as a process of its own, told over stdin what to do, with events and their times on stdout.

python -m tests.netns.end receiver <address to listen on>            first line: its address
python -m tests.netns.end writer <address to listen on> <target>     then lines: reserve XFER SECONDS | finish XFER
"""

from __future__ import annotations

import json
import random
import sys
import time

import msgspec

from kvstore.address import KVAddress
from kvstore.readable import wait_readable
from kvstore.transport import Arrived, BlocksFree, GrantReceived, KVNode, KVRegion, ReserveRequested, Times
from tests.contract.transport_peer import COMPAT, SECRET

NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES = 16, 4, 64 << 10
TCP_SILENCE_S = 4.0
PLACES = list(range(NUM_BLOCKS))


def main() -> None:
    role, bind = sys.argv[1:3]
    region = KVRegion.create(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
    right = random.Random(7).randbytes(region.num_bytes)
    if role == "writer":
        region.buffer[:] = right
    node = KVNode(
        incarnation=role,
        region=region,
        secret=SECRET,
        compat=COMPAT,
        protocols=("tcp",),
        bind=bind,
        times=Times(tcp_silence_s=TCP_SILENCE_S),
    )
    tell(address=msgspec.json.encode(node.start()).decode())
    while True:
        readable = wait_readable([node.wake_fd, sys.stdin], 0.5)
        for event in node.poll_events():
            is_right = None
            if isinstance(event, ReserveRequested):
                node.grant(event, PLACES)
            elif isinstance(event, Arrived):
                is_right = region.buffer == right
                node.settle(event.xfer, True)
            elif isinstance(event, GrantReceived):
                node.push(event.xfer, [(place, place) for place in PLACES], 0, NUM_LAYERS)
            elif isinstance(event, BlocksFree):
                is_right = list(event.blocks) == PLACES and not any(node.grants().values())
            tell(event=type(event).__name__, reason=getattr(event, "reason", ""), is_right=is_right)
        if sys.stdin in readable:
            words = sys.stdin.readline().split()
            if not words:
                node.stop()
                return
            if words[0] == "reserve":
                target = msgspec.json.decode(sys.argv[3], type=KVAddress)
                node.reserve(
                    target, words[1], rid="r", epoch=1, token="t", num_blocks=NUM_BLOCKS, deadline_s=float(words[2])
                )
            elif words[0] == "finish":
                node.commit(words[1], src_blocks=PLACES, num_tokens=NUM_BLOCKS, state=b"")


def tell(**fields: object) -> None:
    print(json.dumps({"at_s": time.monotonic(), **fields}), flush=True)


if __name__ == "__main__":
    main()
