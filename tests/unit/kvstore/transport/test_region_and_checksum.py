from __future__ import annotations

import os

import pytest

from kvstore.transport import KVRegion, RegionError
from kvstore.transport.checksum import TransferChecksum


def checksum(region: KVRegion, blocks: list[int], **changes: object) -> int:
    head = {"xfer": "x", "epoch": 1, "num_tokens": 64, "state": b"s"} | changes
    total = TransferChecksum(**head)  # type: ignore[arg-type]
    for _ in total.update(region, blocks, 100):
        pass
    return total.value()


def test_two_mappings_show_the_same_bytes() -> None:
    region = KVRegion.create(3, 2, 4096)
    peer = KVRegion.attach(os.dup(region.fd), num_blocks=3, num_layers=2, layer_bytes=4096)
    peer.run(1, 1, 2)[:] = b"\x05" * 4096
    assert region.buffer[3 * 4096 : 4 * 4096] == b"\x05" * 4096
    assert sum(region.buffer) == 5 * 4096


def test_a_peer_cannot_shrink_what_we_map() -> None:
    region = KVRegion.create(3, 2, 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 4096)


def test_a_region_of_another_size_or_unsealed_is_not_mapped() -> None:
    region = KVRegion.create(3, 2, 4096)
    with pytest.raises(RegionError, match="announced"):
        KVRegion.attach(os.dup(region.fd), num_blocks=4, num_layers=2, layer_bytes=4096)
    unsealed = os.memfd_create("x")
    os.ftruncate(unsealed, 4096)
    with pytest.raises(RegionError, match="shrink"):
        KVRegion.attach(unsealed, num_blocks=1, num_layers=1, layer_bytes=4096)


def test_the_checksum_covers_who_what_and_where() -> None:
    region = KVRegion.create(3, 1, 64)
    region.buffer[:] = os.urandom(region.num_bytes)
    base = checksum(region, [0, 1])
    assert checksum(region, [0, 1]) == base
    others = [checksum(region, [1, 0]), checksum(region, [0, 2])]
    others += [checksum(region, [0, 1], **{key: value}) for key, value in (("xfer", "y"), ("epoch", 2))]
    others += [checksum(region, [0, 1], **{key: value}) for key, value in (("num_tokens", 63), ("state", b"t"))]
    region.block(1)[3] ^= 0x80
    others.append(checksum(region, [0, 1]))
    assert base not in others
    assert len(set(others)) == len(others)
