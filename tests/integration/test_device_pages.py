"""Two processes push pages of KV that peers cannot map: of private memory here, of a GPU where there is one."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvstore.transport import Arrived, Handed, PushFailed, ReserveRequested
from tests.contract.bounced_end import BouncedEnd, DeviceBytes
from tests.contract.direct_end import DirectEnd
from tests.contract.nixl_peer import DeviceMemory
from tests.contract.transport_helpers import PROTOCOLS, ROOT, Child, granted, needs_nixl
from tests.contract.transport_peer import LAYER_BYTES, NUM_BLOCKS, NUM_LAYERS

HAS_GPU = torch.cuda.is_available()
PUSHED = pytest.mark.skipif(not HAS_GPU, reason="no GPU: device pages through pinned memory are not tested here")
DIRECT = pytest.mark.skipif(not HAS_GPU, reason="no GPU: device pages at their own addresses are not tested here")
IPC = pytest.mark.skipif(not HAS_GPU, reason="no GPU: device pages over cuda_ipc are not tested here")


def takes_pages_of(end: BouncedEnd | DirectEnd, role: str, protocol: str, run_dir: str) -> None:
    """Four patterned pages of a writer in a process of its own, byte for byte; closes `end`."""
    expected = DeviceBytes(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
    expected.fill_with_pattern()
    try:
        with Child(role, protocol, run_dir, end.address) as child:
            end.node.grant(end.wait(ReserveRequested, timeout_s=60), list(range(10, 18)))
            assert child.read_event() == "GrantReceived"
            child.tell("commit")
            assert end.wait(Arrived).blocks == tuple(range(10, 18))
            for place in range(4):
                assert end.region.block(10 + place) == expected.block(place)
            assert not any(end.region.block(14)), "a block that nobody filled"
            end.node.settle("w:1", True)
            assert child.read_event() == Handed.__name__
        end.node.check_invariants()
    finally:
        end.close()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=PUSHED)])
def test_pages_of_another_process_get_from_its_device_to_ours(device: str, protocol: str, tmp_path: Path) -> None:
    end = BouncedEnd("here", str(tmp_path), [protocol], device=device)
    role = "bounced-writer" if device == "cpu" else f"{device}-writer"
    takes_pages_of(end, role, protocol, str(tmp_path))


@needs_nixl
@pytest.mark.parametrize(
    ("role", "device"),
    [
        ("direct-writer", "cpu"),
        *(
            pytest.param(role, device, marks=DIRECT)
            for role, device in [("directcuda-writer", "cuda"), ("directcuda-writer", "cpu"), ("direct-writer", "cuda")]
        ),
    ],
)
def test_pages_of_another_process_get_from_its_memory_to_ours_by_their_addresses(
    role: str, device: str, tmp_path: Path
) -> None:
    """Each end in memory of the host or of a GPU; verified where the pages are."""
    end = DirectEnd("here", str(tmp_path), device=device)
    takes_pages_of(end, role, "rdma", str(tmp_path))


@needs_nixl
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=DIRECT)])
def test_a_page_that_changes_on_its_device_before_the_check_never_arrives(device: str, tmp_path: Path) -> None:
    writer, reader = (DirectEnd(name, str(tmp_path), device=device) for name in ("writer", "reader"))
    try:
        writer.region.fill_with_pattern()  # type: ignore[attr-defined]
        granted(writer, reader, "w:1", [3])
        writer.node.push("w:1", [(0, 0)], 0, NUM_LAYERS)
        ends_s = time.monotonic() + 10
        while reader.region.block(3) != writer.region.block(0):
            assert time.monotonic() < ends_s, "the push did not land"
            time.sleep(0.01)
        reader.region.kv[3, 1, 4321] += 1  # type: ignore[attr-defined]
        writer.node.commit("w:1", src_blocks=[0], num_tokens=32, state=b"")
        assert writer.wait(PushFailed).reason == "checksum"
    finally:
        writer.close()
        reader.close()


def test_the_cost_of_the_bounce_can_be_measured() -> None:
    command = [sys.executable, "-m", "engines.device_kv.measure", "--blocks", "2", "--block-kib", "64", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"with bounce ([0-9.]+) times as long", done.stdout)
    assert found is not None and float(found[1]) > 0


@needs_nixl
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=IPC)])
def test_nixl_moves_bytes_from_the_memory_of_one_process_to_that_of_another(device: str) -> None:
    """Which UCX does by cuda_ipc between two processes that see one GPU; below a node, and without it."""
    num_bytes = 4 << 20
    own = DeviceMemory("writer", device, num_bytes)
    own.bytes.copy_(torch.arange(num_bytes, device=device) % 251)
    peer = subprocess.Popen(
        [sys.executable, "-m", "tests.contract.nixl_peer", device, str(num_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert peer.stdin is not None and peer.stdout is not None
    try:
        metadata, address = peer.stdout.readline().split()
        name = own.agent.loadRemoteMD(bytes.fromhex(metadata)).decode()
        nixl = own.nixl
        source = nixl.nixlXferDList(own.kind, [(own.bytes.data_ptr(), num_bytes, 0)])
        target = nixl.nixlXferDList(own.kind, [(int(address), num_bytes, 0)])
        handle = own.agent.createXferReq(nixl.NIXL_WRITE, source, target, name, "", own.backends)
        own.agent.postXferReq(handle)
        ends_s = time.monotonic() + 30
        while own.agent.getXferStatus(handle) == nixl.NIXL_IN_PROG:
            assert time.monotonic() < ends_s, "the write did not end"
            time.sleep(0.005)
        own.agent.releaseXferReq(handle)
        peer.stdin.write("sum\n")
        peer.stdin.flush()
        assert int(peer.stdout.readline()) == own.sum_by_place() != 0
    finally:
        peer.kill()
        peer.wait()
        peer.stdin.close()
        peer.stdout.close()
