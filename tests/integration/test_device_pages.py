"""Two processes push pages of KV that peers cannot map: of private memory here, of a GPU where there is one."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvstore.transport import Arrived, Handed, ReserveRequested
from tests.contract.bounced_end import BouncedEnd, DeviceBytes
from tests.contract.nixl_peer import DeviceMemory
from tests.contract.transport_helpers import PROTOCOLS, ROOT, Child, needs_nixl
from tests.contract.transport_peer import LAYER_BYTES, NUM_BLOCKS, NUM_LAYERS

HAS_GPU = torch.cuda.is_available()
PUSHED = pytest.mark.skipif(not HAS_GPU, reason="no GPU: device pages through pinned memory are not tested here")
IPC = pytest.mark.skipif(not HAS_GPU, reason="no GPU: device pages over cuda_ipc are not tested here")


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=PUSHED)])
def test_pages_of_another_process_get_from_its_device_to_ours(device: str, protocol: str, tmp_path: Path) -> None:
    expected = DeviceBytes(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
    expected.fill_with_pattern()
    end = BouncedEnd("here", str(tmp_path), [protocol], device=device)
    role = "bounced-writer" if device == "cpu" else f"{device}-writer"
    try:
        with Child(role, protocol, str(tmp_path), end.address) as child:
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


def test_the_cost_of_the_bounce_can_be_measured() -> None:
    command = [sys.executable, "-m", "engines.device_kv.measure", "--blocks", "2", "--block-kib", "64", "--rounds", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"with bounce ([0-9.]+) times as long", done.stdout)
    assert found is not None and float(found[1]) > 0


@needs_nixl
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=IPC)])
def test_nixl_moves_bytes_from_the_memory_of_one_process_to_that_of_another(device: str) -> None:
    """Which UCX does by cuda_ipc between two processes that see one GPU. No worker uses it yet: KV goes by the host."""
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
