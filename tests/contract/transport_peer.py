"""The other process of the transport tests: a writer or a receiver that is told over stdin what to do.

    python -m tests.contract.transport_peer <writer|receiver> <protocol> <run dir> [target address as JSON]
As `bounced-writer` or `bounced-receiver` its KV lies apart from what peers can map, as `cuda-writer` on a GPU; as
`direct-writer`, `direct-receiver` or `directcuda-writer` rdma moves such KV by its own addresses.
Prints its address (receiver), then one line per event: the name of its class.
"""

from __future__ import annotations

import contextlib
import sys

import msgspec

from kvstore.address import KVAddress
from kvstore.readable import wait_readable
from kvstore.transport import Arrived, GrantReceived, KVNode, KVPort, KVRegion, ReserveRequested

NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES = 32, 4, 64 << 10
SECRET, COMPAT = b"the cluster secret", "compat-1"


def main() -> None:
    role, protocol, run_dir = sys.argv[1:4]
    node = make_node(role, protocol, run_dir)
    address = node.start()
    print(msgspec.json.encode(address).decode(), flush=True)
    if role.endswith("writer"):
        target = msgspec.json.decode(sys.argv[4], type=KVAddress)
        node.reserve(target, "w:1", rid="r1", epoch=1, token="t", num_blocks=8, deadline_s=60)
    while True:
        readable = wait_readable([node.wake_fd, sys.stdin], 0.5)
        for event in node.poll_events():
            match event:
                case GrantReceived():
                    node.push("w:1", [(place, place) for place in range(4)], 0, NUM_LAYERS)
                case ReserveRequested():
                    node.grant(event, list(range(event.num_blocks)))
                case Arrived():
                    pass  # never settled: a receiver whose hand-off hangs
            print(type(event).__name__, flush=True)
        if sys.stdin in readable:
            line = sys.stdin.readline().strip()
            if line == "push":  # as much as it can, until it is killed
                for _ in range(2000):
                    node.push("w:1", [(place, place) for place in range(8)], 0, NUM_LAYERS)
            elif line == "commit":
                node.commit("w:1", src_blocks=list(range(4)), num_tokens=100, state=b"s")
            elif not line:
                node.stop()
                return


def make_node(role: str, protocol: str, run_dir: str) -> KVPort:
    """All bytes of its KV are 7; where it is bounced or direct they are a pattern."""
    kind = role.partition("-")[0]
    if kind.startswith("direct"):
        return make_direct_node(role, protocol, run_dir, kind.removeprefix("direct") or "cpu")
    is_bounced = kind in ("bounced", "cuda")
    num_blocks = 2 * NUM_BLOCKS if is_bounced else NUM_BLOCKS
    region = KVRegion.create(num_blocks, NUM_LAYERS, LAYER_BYTES)
    node = KVNode(
        incarnation=f"{role}-child", region=region, secret=SECRET, compat=COMPAT, protocols=(protocol,), run_dir=run_dir
    )
    if not is_bounced:
        region.buffer[:] = bytes([7]) * region.num_bytes
        return node
    from tests.contract.bounced_end import DeviceBytes, bounced  # torch: only where it is needed

    device = DeviceBytes(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES, "cpu" if kind == "bounced" else kind)
    device.fill_with_pattern()
    return bounced(node, region, device)


def make_direct_node(role: str, protocol: str, run_dir: str, device: str) -> KVPort:
    from engines.device_kv.device_region import DeviceRegion  # torch: only where it is needed
    from tests.contract.bounced_end import DeviceBytes
    from tests.contract.direct_end import direct

    kv = DeviceBytes(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES, device)
    kv.fill_with_pattern()
    region = DeviceRegion(kv.kv)
    node = KVNode(
        incarnation=f"{role}-child", region=region, secret=SECRET, compat=COMPAT, protocols=(protocol,), run_dir=run_dir
    )
    return direct(node, kv)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
