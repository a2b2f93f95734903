"""A node over KV that rdma writes at its own addresses: on a CPU private memory stands in for that of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from engines.device_kv.device_region import DeviceRegion
from engines.device_kv.direct_node import DirectNode
from engines.device_kv.gates import gate_of
from engines.device_kv.lane import CopyThread
from kvstore.transport import Event, KVNode, Times
from tests.contract.bounced_end import DeviceBytes, hold
from tests.contract.transport_helpers import End
from tests.contract.transport_peer import COMPAT, LAYER_BYTES, NUM_BLOCKS, NUM_LAYERS, SECRET


def direct(node: KVNode, device: DeviceBytes) -> DirectNode:
    """`node` serves the `DeviceRegion` of `device`."""
    return DirectNode(node, gate=partial(gate_of, device.kv.device), make_lane=CopyThread)


class DirectEnd(End):
    """`region` is the device's KV, which peers write into."""

    def __init__(
        self,
        name: str,
        run_dir: str,
        protocols: Sequence[str] = ("rdma",),
        *,
        secret: bytes = SECRET,
        compat: str = COMPAT,
        times: Times | None = None,
        device: str = "cpu",
    ) -> None:
        self.region = DeviceBytes(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES, device)  # type: ignore[assignment]
        self.inner = KVNode(
            incarnation=name,
            region=DeviceRegion(self.region.kv),  # type: ignore[attr-defined]
            secret=secret,
            compat=compat,
            protocols=protocols,
            run_dir=run_dir,
            times=times,
        )
        self.direct = direct(self.inner, self.region)  # type: ignore[arg-type]
        self.node = self.direct  # type: ignore[assignment]
        self.address = self.node.start()
        self.events: list[Event] = []
        self._num_seen = 0

    def close(self) -> None:
        self.node.stop()

    def hold_kv_thread(self) -> Callable[[], None]:
        return hold(self.inner._loop.post)

    def hold_gates(self) -> Callable[[], None]:
        """No gate opens until what is returned is called, or for 5 s."""
        return hold(self.direct._lane.submit)
