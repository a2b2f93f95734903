"""The pairs of unlike layouts that are measured: what converting costs beside a transfer of the same bytes.

    heads       writer holds 8 heads, reader 4 of them: 2 x layers runs per block, packed through the gather buffer
    blocks      16 tokens become 32
    widen       bfloat16 becomes float32
    int8, fp8   one byte per value on the wire, expanded at the reader

Bytes are those that arrive in the reader's pages, for all cases the same.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from kvstore.reshard import KVLayout
from kvstore.transport.measure_pair import NodeSpec

# A layer of a block: 64 KiB, a head's keys 4 KiB; about the shape of an 8B model's attention, with fewer layers.
BASE: Final = KVLayout(
    num_layers=8, num_kv_heads=8, head_lo=0, head_hi=8, block_size=32, head_dim=64, dtype="bfloat16"
)  # fmt: skip
_CASES: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "heads": ({}, {"head_hi": 4}),
    "blocks": ({"block_size": 16}, {}),
    "widen": ({}, {"dtype": "float32"}),
    "int8": ({"compression": "int8"}, {"compression": "int8"}),
    "fp8": ({"compression": "fp8"}, {"compression": "fp8"}),
}


def unlike_specs(protocol: str, num_bytes: int) -> list[NodeSpec]:
    """With the checksum off. `num_bytes` arrive; compression is for networks only."""
    found = []
    for name, (ours, theirs) in _CASES.items():
        if protocol == "shm" and name in ("int8", "fp8"):
            continue
        writer, reader = msgspec.structs.replace(BASE, **ours), msgspec.structs.replace(BASE, **theirs)
        block_bytes = reader.num_layers * reader.layer_bytes
        num_tokens = num_bytes // block_bytes * reader.block_size
        num_blocks = num_tokens // writer.block_size
        found.append(
            NodeSpec(
                f"{protocol}_{name}", protocol, block_bytes, num_blocks, False, False, (writer, reader), num_tokens
            )
        )
    return found
