"""KV at its own addresses: what of it is refused, and in which order a direct node asks its node."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

import configs
from engines.device_kv.device_region import DeviceRegion
from engines.device_kv.direct_node import DirectNode
from engines.device_kv.sizing import choose_direct
from kvstore.native.pages import CellDigests
from kvstore.transport import MemoryKind, RegionError, ReserveRequested


def test_a_region_of_a_tensor_has_its_address_and_sizes() -> None:
    kv = torch.zeros((5, 3, 2, 4, 8, 16))
    region = DeviceRegion(kv)
    assert (region.num_blocks, region.num_layers, region.layer_bytes) == (5, 3, 2 * 4 * 8 * 16 * 4)
    assert (region.address, region.num_bytes) == (kv.data_ptr(), kv.numel() * 4)
    assert region.kind == MemoryKind("dram", 0)


def test_what_the_host_copies_needs_no_draining(monkeypatch: pytest.MonkeyPatch) -> None:
    def synchronize(_: object) -> None:
        raise AssertionError("there is no device to wait for")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    DeviceRegion(torch.zeros((4, 2, 512), dtype=torch.uint8)).drain()


def test_layers_too_small_for_the_check_are_refused_by_name() -> None:
    with pytest.raises(RegionError, match=r"a layer of a block has 128 bytes.*at least 241.*kv.direct: off"):
        DeviceRegion(torch.zeros((4, 2, 128), dtype=torch.uint8))


@pytest.mark.parametrize(
    ("blocks", "first", "lo", "hi"), [([5], 0, 0, 2), ([-1], 0, 0, 2), ([0], 4, 0, 2), ([0], 0, 1, 1), ([0], 0, 0, 3)]
)
def test_cells_out_of_bounds_are_refused_before_anything_is_hashed(
    blocks: list[int], first: int, lo: int, hi: int
) -> None:
    region, cells = DeviceRegion(torch.zeros((5, 2, 512), dtype=torch.uint8)), CellDigests(4, 2)
    with pytest.raises(ValueError, match="out of bounds"):
        region.ops.hash(region.pages, blocks, first=first, lo=lo, hi=hi, cells=cells)
    assert set(cells.sources) == {-1}


def test_a_changed_byte_anywhere_changes_the_digest_of_its_cell_and_of_no_other() -> None:
    rng = random.Random(2)
    kv = torch.randint(0, 256, (6, 2, 3000), dtype=torch.uint8)
    region, blocks = DeviceRegion(kv), [4, 0, 5]

    def hashed() -> list[int]:
        cells = CellDigests(3, 2)
        region.ops.fill(region.pages, blocks, cells=cells, start=0, max_bytes=1 << 30)
        return cells.digests.tolist()

    before = hashed()
    for offset in [0, 63, 64, 1023, 1024, 2935, 2936, 2999, *rng.sample(range(3000), 20)]:
        kv[0, 1, offset] ^= 1 << rng.randrange(8)
        after = hashed()
        assert [a != b for a, b in zip(before, after, strict=True)] == [False, False, False, True, False, False]
        before = after


@pytest.mark.parametrize(
    ("setting", "protocol", "device", "bounce_bytes", "is_direct"),
    [
        ("auto", "rdma", "cuda", 0, True),
        ("auto", "rdma", "cuda", 1 << 30, False),
        ("auto", "auto", "cuda", 0, False),
        ("auto", "shm", "cuda", 0, False),
        ("auto", "rdma", "cpu", 0, False),
        ("off", "rdma", "cuda", 0, False),
        ("on", "rdma", "cpu", 0, True),
        ("on", "rdma", "cuda", 0, True),
    ],
)
def test_kv_moves_by_its_addresses_where_rdma_is_forced_and_no_bounce_region_is_asked_for(
    setting: str, protocol: str, device: str, bounce_bytes: int, is_direct: bool
) -> None:
    assert choose_direct(setting, protocol=protocol, device=device, bounce_bytes=bounce_bytes) is is_direct


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({}, r"kv.direct: is on, and transfer.protocol is auto"),
        ({"transfer.protocol": "rdma", "kv.bounce_bytes": "64MiB"}, r"kv.bounce_bytes: would not be used"),
        ({"transfer.protocol": "rdma", "decode.tensor_parallel_size": "2"}, r"kv.direct: decode.tensor_parallel_size"),
    ],
)
def test_settings_that_do_not_go_with_direct_kv_are_refused_by_name(flags: dict[str, str], fault: str) -> None:
    with pytest.raises(configs.ConfigError, match=fault):
        configs.load(env={}, flags={"model.path": "m", "kv.direct": "on", **flags})


class Calls:
    """A node that only remembers what it was asked."""

    num_layers, wake_fd = 2, -1

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.pushed: list[tuple[object, ...]] = []

    def push(self, *args: object) -> None:
        self.asked.append("push")
        self.pushed.append(args)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *_, **__: self.asked.append(name)


class Gate:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def synchronize(self) -> None:
        self.log.append(self.name)


class Lane:
    def __init__(self) -> None:
        self.jobs: deque[Callable[[], None]] = deque()

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def start(self) -> None: ...
    def stop(self) -> None: ...


def test_each_call_waits_for_the_compute_that_was_asked_for_before_it_and_all_keep_their_order() -> None:
    calls, lane, num_gates = Calls(), Lane(), iter(range(9))
    node = DirectNode(
        calls,  # type: ignore[arg-type]
        gate=lambda: Gate(f"gate {next(num_gates)}", calls.asked),  # type: ignore[arg-type, return-value]
        make_lane=lambda _name, _failed: lane,
    )
    pairs = [(0, 0)]
    node.push("w:1", pairs, 0, 1)
    pairs.append((1, 1))
    node.push("w:1", pairs, 1, 2)
    node.commit("w:1", src_blocks=[0], num_tokens=3, state=b"")
    node.grant(ReserveRequested("w:2", "r", 1, "t", 1), [4])
    node.abandon("w:1")
    node.settle("w:2", False)
    assert calls.asked == [], "nothing before the device is done"
    while lane.jobs:
        lane.jobs.popleft()()
    gated = [call for i, name in enumerate(("push", "push", "commit", "grant")) for call in (f"gate {i}", name)]
    assert calls.asked == [*gated, "abandon", "settle"]
    assert calls.pushed == [("w:1", [(0, 0)], 0, 1), ("w:1", [(0, 0), (1, 1)], 1, 2)], "as it was when it was asked"
