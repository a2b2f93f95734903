"""A node whose KV lies apart from what peers can map: on a CPU private memory stands in for that of a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from engines.device_kv.bounced_node import BouncedNode
from engines.device_kv.copies import HostCopies, TensorCopies
from engines.device_kv.lane import CopyThread
from engines.device_kv.pinned import pin
from engines.device_kv.slot_pool import SlotPool
from kvstore.transport import Event, KVNode, KVRegion, Times
from tests.contract.transport_helpers import End
from tests.contract.transport_peer import COMPAT, LAYER_BYTES, NUM_BLOCKS, NUM_LAYERS, SECRET

NUM_SLOTS = 2 * NUM_BLOCKS
BLOCK_TOKENS = 32


class DeviceBytes:
    """The KV of an engine. On a GPU `buffer`, `block` and `run` are for tests only: they copy."""

    def __init__(self, num_blocks: int, num_layers: int, layer_bytes: int, device: str = "cpu") -> None:
        self.kv = torch.zeros((num_blocks, num_layers, layer_bytes), dtype=torch.uint8, device=device)
        self.block_bytes = num_layers * layer_bytes
        self.num_bytes = num_blocks * self.block_bytes

    def fill_with_pattern(self) -> None:
        """Bytes that another process can tell, too: the same for all."""
        numbers = torch.arange(self.num_bytes, device=self.kv.device) % 251  # a prime: no two blocks are alike
        self.kv.view(-1).copy_(numbers)

    @property
    def buffer(self) -> memoryview:
        return memoryview(self.kv.flatten().numpy().data)

    def block(self, block_id: int) -> memoryview:
        return memoryview(self.kv[block_id].cpu().flatten().numpy().data)


def bounced(node: KVNode, region: KVRegion, device: DeviceBytes, *, max_per_transfer: int = NUM_BLOCKS) -> BouncedNode:
    """`node` serves `region`, whose blocks are slots for the blocks of `device`."""
    slots = SlotPool(region.num_blocks, max_per_transfer=max_per_transfer)
    if device.kv.device.type == "cpu":
        copies: HostCopies | TensorCopies = HostCopies(device.kv, region)
    else:
        pin(region)
        shape = (region.num_blocks, *device.kv.shape[1:])
        copies = TensorCopies(device.kv, torch.frombuffer(region.buffer, dtype=torch.uint8).view(shape))
    return BouncedNode(node, slots, copies, block_size=BLOCK_TOKENS, make_lane=CopyThread)


class BouncedEnd(End):
    """`region` is the device's KV; `slots` is what peers write into."""

    def __init__(
        self,
        name: str,
        run_dir: str,
        protocols: Sequence[str],
        *,
        secret: bytes = SECRET,
        compat: str = COMPAT,
        times: Times | None = None,
        device: str = "cpu",
        num_slots: int = NUM_SLOTS,
        max_per_transfer: int = NUM_BLOCKS,
    ) -> None:
        self.slots = KVRegion.create(num_slots, NUM_LAYERS, LAYER_BYTES)
        self.region = DeviceBytes(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES, device)  # type: ignore[assignment]
        self.inner = KVNode(
            incarnation=name,
            region=self.slots,
            secret=secret,
            compat=compat,
            protocols=protocols,
            run_dir=run_dir,
            times=times,
        )
        self.bounced = bounced(self.inner, self.slots, self.region, max_per_transfer=max_per_transfer)  # type: ignore[arg-type]
        self.node = self.bounced  # type: ignore[assignment]
        self.address = self.node.start()
        self.events: list[Event] = []
        self._num_seen = 0

    def close(self) -> None:
        self.node.stop()
        self.slots.close()

    def hold_kv_thread(self) -> Callable[[], None]:
        return hold(self.inner._loop.post)

    def hold_copies(self, direction: str) -> Callable[[], None]:
        """No copy is made `out` or `in` until what is returned is called, or for 5 s."""
        return hold({"out": self.bounced._saving, "in": self.bounced._loading}[direction].submit)


def hold(post: Callable[[Callable[[], None]], None]) -> Callable[[], None]:
    """Whoever works through `post` does nothing until what is returned is called, or for 5 s."""
    is_held, may_go = threading.Event(), threading.Event()

    def wait() -> None:
        is_held.set()
        may_go.wait(5)

    post(wait)
    assert is_held.wait(5)
    return may_go.set
