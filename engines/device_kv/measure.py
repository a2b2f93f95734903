"""What the bounce costs: the same push between two nodes with KV in the shared region and with KV apart, in turn.

    python -m engines.device_kv.measure [--blocks 64] [--block-kib 1024] [--rounds 30] [--device cpu]

A round is one push of all blocks in four groups of layers, from the first push until the receiving engine hears of the
arrival; both ways are run in each round, in changing order. Over shm, in one process, so both engines and all copies
share its cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from itertools import count

import torch

from engines.device_kv.bounced_node import BouncedNode
from engines.device_kv.copies import HostCopies, TensorCopies
from engines.device_kv.lane import CopyThread
from engines.device_kv.pinned import pin
from engines.device_kv.slot_pool import SlotPool
from kvstore.address import KVAddress
from kvstore.transport import Arrived, GrantReceived, Handed, KVNode, KVPort, KVRegion, ReserveRequested
from kvstore.transport.measure import wait_for

NUM_LAYERS, NUM_GROUPS = 32, 4
NUM_TOKENS_PER_BLOCK = 32
WARM_UP_ROUNDS = 3
TIMEOUT_S = 30.0


class _Way:
    """A writer and a reader of `num_blocks` blocks each; `num_slots` 0: no bounce."""

    def __init__(self, name: str, folder: str, num_blocks: int, layer_bytes: int, device: str, num_slots: int) -> None:
        self._num_blocks = num_blocks
        self._names = (f"{name}:{n}" for n in count())
        self._writer, _ = _node(f"{name}-writer", folder, num_blocks, layer_bytes, device, num_slots)
        self._reader, self._target = _node(f"{name}-reader", folder, num_blocks, layer_bytes, device, num_slots)

    def push_s(self) -> float:
        """Seconds of one push."""
        xfer, blocks = next(self._names), list(range(self._num_blocks))
        self._writer.reserve(
            self._target, xfer, rid="r", epoch=1, token="t", num_blocks=len(blocks), deadline_s=TIMEOUT_S
        )
        self._reader.grant(wait_for(self._reader, ReserveRequested, timeout_s=TIMEOUT_S), blocks)
        wait_for(self._writer, GrantReceived, timeout_s=TIMEOUT_S)
        group = NUM_LAYERS // NUM_GROUPS
        start_s = time.perf_counter()
        for lo in range(0, NUM_LAYERS, group):
            self._writer.push(xfer, list(zip(blocks, blocks, strict=True)), lo, lo + group)
        num_tokens = len(blocks) * NUM_TOKENS_PER_BLOCK
        self._writer.commit(xfer, src_blocks=blocks, num_tokens=num_tokens, state=b"")
        wait_for(self._reader, Arrived, timeout_s=TIMEOUT_S)
        seconds = time.perf_counter() - start_s
        self._reader.settle(xfer, True)
        wait_for(self._writer, Handed, timeout_s=TIMEOUT_S)
        return seconds

    def close(self) -> None:
        self._writer.stop()
        self._reader.stop()


def _node(
    name: str, folder: str, num_blocks: int, layer_bytes: int, device: str, num_slots: int
) -> tuple[KVPort, KVAddress]:
    region = KVRegion.create(num_slots or num_blocks, NUM_LAYERS, layer_bytes)
    node = KVNode(incarnation=name, region=region, secret=b"measure", compat="c", protocols=("shm",), run_dir=folder)
    port: KVPort = node
    if num_slots:
        kv = torch.ones((num_blocks, NUM_LAYERS, layer_bytes), dtype=torch.uint8, device=device)
        copies: HostCopies | TensorCopies = HostCopies(kv, region)
        if device != "cpu":
            pin(region)
            slots = torch.frombuffer(region.buffer, dtype=torch.uint8).view(num_slots, *kv.shape[1:])
            copies = TensorCopies(kv, slots)
        pool = SlotPool(num_slots, max_per_transfer=num_blocks)
        port = BouncedNode(node, pool, copies, block_size=NUM_TOKENS_PER_BLOCK, make_lane=CopyThread)
    else:
        region.buffer[:] = b"\x01" * region.num_bytes
    return port, port.start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--block-kib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    layer_bytes = args.block_kib * 1024 // NUM_LAYERS
    with tempfile.TemporaryDirectory(prefix="celeriac-bounce-") as folder:
        plain = _Way("plain", folder, args.blocks, layer_bytes, "cpu", 0)
        bounced = _Way("bounced", folder, args.blocks, layer_bytes, args.device, 2 * args.blocks)
        ratios, speeds = [], []
        for i in range(-WARM_UP_ROUNDS, args.rounds):
            if i % 2:
                bounced_s, plain_s = bounced.push_s(), plain.push_s()
            else:
                plain_s, bounced_s = plain.push_s(), bounced.push_s()
            if i >= 0:
                ratios.append(bounced_s / plain_s)
                speeds.append(args.blocks * args.block_kib * 1024 / plain_s / 2**30)
        plain.close()
        bounced.close()
    low, _, high = statistics.quantiles(ratios, n=4)
    print(f"{args.blocks} blocks of {args.block_kib} KiB, {args.rounds} rounds, KV on {args.device}")
    print(f"without bounce {statistics.median(speeds):.2f} GiB/s (median)")
    print(
        f"with bounce {statistics.median(ratios):.2f} times as long (median; half of the rounds {low:.2f}..{high:.2f})"
    )


if __name__ == "__main__":
    main()
