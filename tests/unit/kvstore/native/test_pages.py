"""Copying and hashing cells: exactly xxh3_64, exactly the bytes, nothing out of bounds; C++ and Python alike."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import xxhash

from kvstore.native.pages import CellDigests, NativePages, PageOps, PythonPages, page_ops
from kvstore.transport import KVRegion

SIZES = [241, 256, 320, 1000, 1024, 1025, 1088, 2048, 4096, 16384, 65536 + 64]


@pytest.fixture(params=["native", "python"])
def ops_for(request: pytest.FixtureRequest) -> Callable[[int], PageOps]:
    return page_ops if request.param == "native" else lambda _: PythonPages()


def region_of(num_blocks: int, num_layers: int, layer_bytes: int, *, seed: int) -> KVRegion:
    region = KVRegion.create(num_blocks, num_layers, layer_bytes)
    region.buffer[:] = random.Random(seed).randbytes(region.num_bytes)
    return region


def test_this_machine_compiles_the_native_one() -> None:
    assert isinstance(page_ops(16384), NativePages)
    assert isinstance(page_ops(64), PythonPages)


@pytest.mark.parametrize("layer_bytes", SIZES)
def test_digests_are_those_of_the_xxhash_package(ops_for: Callable[[int], PageOps], layer_bytes: int) -> None:
    region, cells = region_of(3, 2, layer_bytes, seed=layer_bytes), CellDigests(4, 2)

    ops_for(layer_bytes).hash(region.pages, [2, 0], first=1, lo=0, hi=2, cells=cells)

    expected = [xxhash.xxh3_64_intdigest(region.run(block, layer, layer + 1)) for block in (2, 0) for layer in (0, 1)]
    assert cells.digests.tolist() == [0, 0, *expected, 0, 0]
    assert cells.sources.tolist() == [-1, -1, 2, 2, 0, 0, -1, -1]


@pytest.mark.parametrize("layer_bytes", [*SIZES, 1 << 20])  # the last one is copied past the caches
@pytest.mark.parametrize("is_hashed", [True, False])
def test_a_copy_moves_the_bytes_of_its_layers_and_no_other(
    ops_for: Callable[[int], PageOps], layer_bytes: int, is_hashed: bool
) -> None:
    own, peer = region_of(3, 3, layer_bytes, seed=1), region_of(4, 3, layer_bytes, seed=2)
    before = bytes(peer.buffer)
    cells = CellDigests(2, 3) if is_hashed else None

    ops_for(layer_bytes).copy(own.pages, peer.pages, [2, 0], [1, 3], first=0, lo=1, hi=3, cells=cells)

    for source, target in ((2, 1), (0, 3)):
        assert peer.run(target, 1, 3) == own.run(source, 1, 3)
        peer.run(target, 1, 3)[:] = before[(target * 3 + 1) * layer_bytes : (target * 3 + 3) * layer_bytes]
    assert peer.buffer == before
    if cells is not None:
        again = CellDigests(2, 3)
        PythonPages().hash(own.pages, [2, 0], first=0, lo=1, hi=3, cells=again)
        assert (cells.digests, cells.sources) == (again.digests, again.sources)


@pytest.mark.parametrize(
    ("sources", "targets", "first", "lo", "hi"),
    [
        ([3], [0], 0, 0, 1),
        ([-1], [0], 0, 0, 1),
        ([0], [4], 0, 0, 1),
        ([0], [0], 0, 0, 4),
        ([0], [0], 0, 2, 2),
        ([0], [0], 0, -1, 1),
        ([0], [0], 2, 0, 1),
        ([0], [0], -1, 0, 1),
        ([0, 1], [0], 0, 0, 1),
    ],
)
def test_a_copy_out_of_bounds_touches_nothing(
    ops_for: Callable[[int], PageOps], sources: list[int], targets: list[int], first: int, lo: int, hi: int
) -> None:
    own, peer = region_of(3, 3, 1024, seed=1), region_of(4, 3, 1024, seed=2)
    before = bytes(peer.buffer)

    with pytest.raises(ValueError, match="out of bounds"):
        ops_for(1024).copy(own.pages, peer.pages, sources, targets, first=first, lo=lo, hi=hi, cells=CellDigests(2, 3))

    assert peer.buffer == before


def test_fill_hashes_only_what_no_digest_of_the_right_block_is_there_for(ops_for: Callable[[int], PageOps]) -> None:
    region, cells, ops = region_of(4, 2, 1024, seed=3), CellDigests(3, 2), ops_for(1024)
    ops.hash(region.pages, [3, 1], first=0, lo=0, hi=2, cells=cells)
    cells.digests[0] = 77  # of block 3, which stays at place 0: believed
    starts = [0]
    while starts[-1] < 6:
        starts.append(ops.fill(region.pages, [3, 2, 0], cells=cells, start=starts[-1], max_bytes=1024))

    assert starts == [0, 3, 4, 5, 6]
    assert cells.sources.tolist() == [3, 3, 2, 2, 0, 0]
    assert cells.digests[0] == 77
    assert cells.digests[2] == xxhash.xxh3_64_intdigest(region.run(2, 0, 1))
    with pytest.raises(ValueError, match="out of bounds"):
        ops.fill(region.pages, [0, 1, 2, 3], cells=cells, start=0, max_bytes=1)


def test_pages_beyond_two_gigabytes_are_the_ones_that_are_copied_and_hashed(ops_for: Callable[[int], PageOps]) -> None:
    """The regions are sparse: 5 GiB each, of which a few pages exist."""
    layer_bytes, num_blocks = 1 << 20, 2560
    own, peer = KVRegion.create(num_blocks, 2, layer_bytes), KVRegion.create(num_blocks, 2, layer_bytes)
    sources, targets = [1023, 1024, 2559], [2047, 2559, 1025]  # at, past and far past 2^31 bytes
    for block in sources:
        own.run(block, 1, 2)[:] = os.urandom(layer_bytes)
    cells, landed = CellDigests(3, 2), CellDigests(3, 2)

    ops_for(layer_bytes).copy(own.pages, peer.pages, sources, targets, first=0, lo=1, hi=2, cells=cells)
    ops_for(layer_bytes).hash(peer.pages, targets, first=0, lo=1, hi=2, cells=landed)

    for place, (source, target) in enumerate(zip(sources, targets, strict=True)):
        assert peer.run(target, 1, 2) == own.run(source, 1, 2)
        assert cells.digests[2 * place + 1] == xxhash.xxh3_64_intdigest(own.run(source, 1, 2))
    assert landed.digests == cells.digests
    own.close()
    peer.close()
