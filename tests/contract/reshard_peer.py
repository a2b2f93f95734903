"""One rank of a worker that holds some of the heads, in a process of its own; for the tests of head slices.

    python -m tests.contract.reshard_peer <writer|reader> <spec as JSON>

A reader prints its address; then `OK` if all its pages hold what they should, byte by byte, else what differs. A
writer gets the addresses over stdin, pushes, and prints `OK` when all readers have taken over.
"""

from __future__ import annotations

import contextlib
import sys
import time

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstore.address import KVAddress
from kvstore.readable import wait_readable
from kvstore.reshard import KVLayout
from kvstore.reshard.pack import blocks_as_words
from kvstore.transport import (
    Arrived,
    Event,
    GrantReceived,
    GrantRefused,
    Handed,
    KVNode,
    KVRegion,
    PushFailed,
    Refused,
    ReserveRequested,
)

LAYERS, HEADS, DIM = 3, 8, 4
LIMIT_S = 60.0


class Spec(msgspec.Struct, frozen=True):
    """One process. Every rank knows the whole KV: bfloat16 words of tokens, each another one."""

    protocol: str
    run_dir: str
    rank: int
    num_ranks: int
    block_size: int
    num_tokens: int

    @property
    def layout(self) -> KVLayout:
        per_rank = HEADS // self.num_ranks
        return KVLayout(
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_lo=self.rank * per_rank,
            head_hi=(self.rank + 1) * per_rank,
            block_size=self.block_size,
            head_dim=DIM,
            dtype="bfloat16",
        )

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)


def whole_kv(num_tokens: int) -> NDArray[np.uint16]:
    words = np.random.default_rng(num_tokens).integers(1, 1 << 15, num_tokens * LAYERS * 2 * HEADS * DIM)
    return words.astype(np.uint16).reshape(num_tokens, LAYERS, 2, HEADS, DIM)


def main() -> None:
    role, spec = sys.argv[1], msgspec.json.decode(sys.argv[2], type=Spec)
    layout = spec.layout
    region = KVRegion.create(spec.num_blocks + 2, LAYERS, layout.layer_bytes)
    pages = blocks_as_words(region.buffer, layout)
    pages[:] = 0xDEAD
    node = KVNode(
        incarnation=f"{role}-{spec.rank}-of-{spec.num_ranks}",
        region=region,
        secret=b"the cluster secret",
        compat="compat-1",
        protocols=(spec.protocol,),
        run_dir=spec.run_dir,
        layout=layout,
    )
    address = node.start()
    if role == "reader":
        print(msgspec.json.encode(address).decode(), flush=True)
        print(_read(node, spec, pages), flush=True)
        sys.stdin.readline()  # writers may still ask
    else:
        print(_write(node, spec, pages), flush=True)
    node.stop()


def _events(node: KVNode) -> list[Event]:
    wait_readable([node.wake_fd], 0.5)
    return node.poll_events()


def _read(node: KVNode, spec: Spec, pages: NDArray[np.uint16]) -> str:
    ends_s = time.monotonic() + LIMIT_S
    blocks = list(range(spec.num_blocks + 1, 1, -1))
    asked = 0
    while time.monotonic() < ends_s:
        for event in _events(node):
            if isinstance(event, ReserveRequested):
                asked += 1
                node.grant(event, blocks)
            elif isinstance(event, Arrived):
                node.check_invariants()
                fault = _fault(spec, pages, blocks) or ("" if asked == 1 else f"the engine was asked {asked} times")
                node.settle(event.xfer, not fault)
                return fault or "OK"
    return "nothing arrived"


def _fault(spec: Spec, pages: NDArray[np.uint16], blocks: list[int]) -> str:
    layout = spec.layout
    whole = whole_kv(spec.num_tokens)[:, :, :, layout.head_lo : layout.head_hi]
    for token in range(spec.num_blocks * spec.block_size):
        got = pages[blocks[token // spec.block_size], :, :, :, token % spec.block_size]
        expected = whole[token] if token < spec.num_tokens else np.zeros_like(got)
        if not (got == expected).all():
            return f"token {token} differs"
    return "" if (pages[:2] == 0xDEAD).all() else "blocks that were not granted were written"


def _write(node: KVNode, spec: Spec, pages: NDArray[np.uint16]) -> str:
    targets = msgspec.json.decode(sys.stdin.readline(), type=list[KVAddress])
    layout = spec.layout
    for token, words in enumerate(whole_kv(spec.num_tokens)):
        pages[token // spec.block_size, :, :, :, token % spec.block_size] = words[:, :, layout.head_lo : layout.head_hi]
    for k, target in enumerate(targets):
        node.reserve(
            target,
            f"w{spec.rank}:{k}",
            rid="r",
            epoch=1,
            token="t",
            num_blocks=spec.num_blocks,
            num_tokens=spec.num_tokens,
            group="sequence-1",
            deadline_s=LIMIT_S,
        )
    own = list(range(spec.num_blocks))
    num_handed, ends_s = 0, time.monotonic() + LIMIT_S
    while num_handed < len(targets) and time.monotonic() < ends_s:
        for event in _events(node):
            if isinstance(event, GrantReceived):
                for lo, hi in ((0, 2), (2, LAYERS)):
                    node.push(event.xfer, [(block, block) for block in own], lo, hi)
                node.commit(event.xfer, src_blocks=own, num_tokens=spec.num_tokens, state=b"s")
            elif isinstance(event, GrantRefused | PushFailed | Refused):
                return repr(event)
            elif isinstance(event, Handed):
                num_handed += 1
    return "OK" if num_handed == len(targets) else "not all took over"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
