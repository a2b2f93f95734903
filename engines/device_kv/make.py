"""The KV port of an engine: its node, with what KV apart from a shared region needs around it."""

from __future__ import annotations

from functools import partial

from engines.device_kv.bounced_node import BouncedNode
from engines.device_kv.copies import copies_for
from engines.device_kv.direct_node import DirectNode
from engines.device_kv.gates import gate_of
from engines.device_kv.lane import CopyThread
from engines.device_kv.sizing import BounceSize
from engines.device_kv.slot_pool import SlotPool
from engines.kv_region import KVTensor
from kvstore.transport import KVNode, KVPort


def make_port(node: KVNode, kv: KVTensor, bounce: BounceSize | None) -> KVPort:
    """`node` serves `kv.served` and is not started yet."""
    if kv.is_direct:
        return DirectNode(node, gate=partial(gate_of, kv.kv.device), make_lane=CopyThread)
    if bounce is None:
        return node
    slots = SlotPool(bounce.num_slots, max_per_transfer=bounce.max_per_transfer)
    return BouncedNode(node, slots, copies_for(kv), block_size=kv.block_size, make_lane=CopyThread)
