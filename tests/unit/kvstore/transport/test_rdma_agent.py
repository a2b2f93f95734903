"""Which memory NIXL is told of at both ends of a write: with bindings that only take notes, since GPUs are rare."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from kvstore.transport.errors import BadFrame
from kvstore.transport.frames import FrameType, Welcome, parse_body
from kvstore.transport.memory import MAX_DEVICES, MemoryKind
from kvstore.transport.rdma_agent import RdmaAgent

HOST, GPU_2, GPU_5 = MemoryKind(), MemoryKind("vram", 2), MemoryKind("vram", 5)


class Bindings:
    """NIXL's module, as far as an agent calls it."""

    DRAM_SEG, VRAM_SEG, NIXL_WRITE, NIXL_IN_PROG = "host", "gpu", "write", 1

    def __init__(self) -> None:
        self.registered: Any = None
        self.requests: list[tuple[Any, ...]] = []
        self.nixlAgentConfig = SimpleNamespace

    def nixlAgent(self, _name: str, _config: object) -> Bindings:  # noqa: N802  (NIXL's names)
        return self

    def nixlRegDList(self, segment: str, runs: list[tuple[int, int, int, str]]) -> object:  # noqa: N802
        return segment, runs

    def nixlXferDList(self, segment: str, runs: list[tuple[int, int, int]]) -> object:  # noqa: N802
        return segment, runs

    def createBackend(self, _name: str, _options: dict[str, str]) -> int:  # noqa: N802
        return 7

    def registerMem(self, memory: object, _backends: list[int]) -> None:  # noqa: N802
        self.registered = memory

    def getLocalMD(self) -> bytes:  # noqa: N802
        return b"keys"

    def loadRemoteMD(self, metadata: bytes) -> bytes:  # noqa: N802
        return metadata

    def createXferReq(self, *request: object) -> int:  # noqa: N802
        self.requests.append(request)
        return len(self.requests)

    def postXferReq(self, _handle: int) -> None:  # noqa: N802
        return None


@pytest.mark.parametrize(("own", "peer"), [(HOST, HOST), (GPU_2, GPU_5), (HOST, GPU_5), (GPU_2, HOST)])
def test_each_end_of_a_write_is_named_with_its_own_memory_and_device(own: MemoryKind, peer: MemoryKind) -> None:
    nixl = Bindings()
    region: Any = SimpleNamespace(address=4096, num_bytes=1 << 20, kind=own)
    agent = RdmaAgent(nixl, "a/1", region)  # type: ignore[arg-type]
    agent.connect(b"peer/1", peer)
    agent.post([(4096, 1 << 40, 512), (8192, 1 << 41, 1024)])

    segments = {"dram": "host", "vram": "gpu"}
    assert nixl.registered == (segments[own.segment], [(4096, 1 << 20, own.device, "")])
    ((kind, near, far, name, _, _),) = nixl.requests
    assert (kind, name) == ("write", "peer/1")
    assert near == (segments[own.segment], [(4096, 512, own.device), (8192, 1024, own.device)])
    assert far == (segments[peer.segment], [(1 << 40, 512, peer.device), (1 << 41, 1024, peer.device)])


@pytest.mark.parametrize("wrong", [{"segment": "tape"}, {"device": -1}, {"device": MAX_DEVICES}, {"device": "0"}])
def test_a_welcome_with_memory_that_there_is_not_is_a_bad_frame(wrong: dict[str, object]) -> None:
    sound = Welcome(4, 2, 4096, address=1 << 20, rdma_metadata=b"m", segment="vram", device=MAX_DEVICES - 1)
    assert parse_body(FrameType.WELCOME, msgspec.msgpack.encode(sound), Welcome) == sound
    fields = [wrong.get(name, getattr(sound, name)) for name in Welcome.__struct_fields__]
    with pytest.raises(BadFrame, match="WELCOME"):
        parse_body(FrameType.WELCOME, msgspec.msgpack.encode(fields), Welcome)


def test_a_welcome_that_does_not_name_its_memory_is_of_a_host() -> None:
    short = msgspec.msgpack.encode([4, 2, 4096, None, 1 << 20, b"m"])
    welcome = parse_body(FrameType.WELCOME, short, Welcome)
    assert MemoryKind(welcome.segment, welcome.device) == HOST
