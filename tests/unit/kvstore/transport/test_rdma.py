"""What a machine's NIXL and devices make of `transfer.protocol`, and when a close is a fence."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from kvstore.transport import rdma
from kvstore.transport.errors import RdmaError
from kvstore.transport.memory import MemoryKind
from kvstore.transport.rdma import is_ended_by_us, usable_protocols


def _machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, version: str, devices: tuple[str, ...]) -> None:
    monkeypatch.setattr(rdma, "nixl_version", lambda: version)
    monkeypatch.setattr(rdma, "DEVICES", tmp_path)
    for device in devices:
        (tmp_path / device).mkdir()


@pytest.mark.parametrize(
    ("version", "devices", "expected"),
    [
        ("nixl-cu12 1.5.1", ("mlx5_0",), ("shm", "rdma", "tcp")),
        ("nixl-cu12 1.5.1", (), ("shm", "tcp")),
        ("", (), ("shm", "tcp")),
        ("", ("mlx5_0",), ("shm", "tcp")),
    ],
)
def test_auto_takes_rdma_where_nixl_and_a_device_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, devices: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    _machine(monkeypatch, tmp_path, version=version, devices=devices)
    assert usable_protocols("auto") == expected


def test_a_device_without_nixl_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _machine(monkeypatch, tmp_path, version="", devices=("mlx5_0",))
    with caplog.at_level(logging.WARNING):
        usable_protocols("auto")
    (line,) = caplog.messages
    assert "celeriac[rdma]" in line


def test_rdma_without_nixl_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _machine(monkeypatch, tmp_path, version="", devices=("mlx5_0",))
    with pytest.raises(RdmaError, match="nixl-cu12 is not installed") as caught:
        usable_protocols("rdma")
    assert caught.value.reason == "no_rdma"


def test_rdma_needs_no_device_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _machine(monkeypatch, tmp_path, version="nixl-cu12 1.5.1", devices=())
    assert usable_protocols("rdma") == ("rdma",)


@pytest.mark.parametrize(
    ("value", "is_proof"),
    [
        ("tcp", True),
        ("rc", True),
        ("rc,ud,tcp", True),
        ("^cma,knem,xpmem", True),
        ("^cma", False),
        ("tcp,cma", False),
        ("shm,rc", False),
        ("all", False),
        ("rc,cuda_ipc", False),
        ("", False),
    ],
)
def test_ending_our_side_is_proof_only_where_no_writer_copies_by_itself(
    monkeypatch: pytest.MonkeyPatch, value: str, is_proof: bool
) -> None:
    monkeypatch.setenv("UCX_TLS", value)
    assert is_ended_by_us() is is_proof


@pytest.mark.parametrize(
    ("value", "is_proof"),
    [
        ("^cma,knem,xpmem", False),
        ("^cma,knem,xpmem,cuda_ipc", True),
        ("^cma,knem,xpmem,cuda", True),
        ("^cma,cuda_ipc", False),
        ("rc,cuda_copy", True),
        ("rc,cuda_copy,cuda_ipc", False),
        ("rc,cuda", False),
    ],
)
def test_memory_of_a_gpu_is_also_written_by_peers_that_map_it(
    monkeypatch: pytest.MonkeyPatch, value: str, is_proof: bool
) -> None:
    monkeypatch.setenv("UCX_TLS", value)
    assert is_ended_by_us(MemoryKind("vram", 0)) is is_proof
