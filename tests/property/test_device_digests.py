"""xxh3_64 in torch, which runs where the pages are, gives the bits of the xxhash package and of the C++."""

from __future__ import annotations

import random

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.device_kv.device_region import UNSIGNED, DeviceRegion
from engines.device_kv.xxh3 import BLOCK, MIN_BYTES, STRIPE, digests
from kvstore.native.pages import CellDigests
from kvstore.transport import KVRegion

# Around every border of the algorithm: stripes, blocks, the last stripe, and any length of a cell.
LENGTHS = st.one_of(
    st.integers(MIN_BYTES, 3 * BLOCK),
    st.integers(MIN_BYTES, 200_000),
    st.builds(
        lambda blocks, stripes, more: max(MIN_BYTES, blocks * BLOCK + stripes * STRIPE + more),
        st.integers(0, 260),
        st.integers(0, 16),
        st.integers(-1, 1),
    ),
)


def random_bytes(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=150, deadline=None)
@given(length=LENGTHS, num_inputs=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_digests_of_random_inputs_are_those_of_xxhash(length: int, num_inputs: int, seed: int) -> None:
    inputs = random_bytes((num_inputs, length), seed)
    expected = [xxhash.xxh3_64_intdigest(row.numpy().tobytes()) for row in inputs]
    assert [digest & UNSIGNED for digest in digests(inputs).tolist()] == expected


@pytest.mark.parametrize("byte", [0, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("length", [241, 1024, 1025, 65536])
def test_digests_of_bytes_that_carry_most_are_those_of_xxhash(byte: int, length: int) -> None:
    inputs = torch.full((2, length), byte, dtype=torch.uint8)
    assert {digest & UNSIGNED for digest in digests(inputs).tolist()} == {
        xxhash.xxh3_64_intdigest(bytes([byte]) * length)
    }


@settings(max_examples=60, deadline=None)
@given(data=st.data(), layer_bytes=st.integers(MIN_BYTES, 20_000), seed=st.integers(0, 2**32))
def test_cells_of_permuted_blocks_have_the_digests_of_the_host_code(
    data: st.DataObject, layer_bytes: int, seed: int
) -> None:
    """Slice by slice, on top of cells that are known already, those of another block among them."""
    num_blocks, num_layers = 9, 3
    region = KVRegion.create(num_blocks, num_layers, layer_bytes)
    try:
        kv = random_bytes((num_blocks, num_layers, layer_bytes), seed)
        region.buffer[:] = kv.numpy().data.cast("B")
        device = DeviceRegion(kv)
        blocks = data.draw(st.permutations(range(num_blocks)))[: data.draw(st.integers(1, num_blocks))]
        slice_bytes = data.draw(st.integers(0, 8 * layer_bytes))
        expected = CellDigests(len(blocks), num_layers)
        region.ops.fill(region.pages, blocks, cells=expected, start=0, max_bytes=1 << 40)

        found = CellDigests(len(blocks), num_layers)
        lo, hi = sorted(data.draw(st.sets(st.integers(0, num_layers), min_size=2, max_size=2)))
        device.ops.hash(device.pages, blocks[:2], first=0, lo=lo, hi=hi, cells=found)
        random.Random(seed).shuffle(wrong := list(blocks))
        device.ops.hash(device.pages, wrong[-1:], first=len(blocks) - 1, lo=0, hi=1, cells=found)
        cell, num_slices = 0, 0
        while cell < len(blocks) * num_layers:
            cell = device.ops.fill(device.pages, blocks, cells=found, start=cell, max_bytes=slice_bytes)
            num_slices += 1
            assert num_slices <= len(blocks) * num_layers
        assert found.digests == expected.digests
        assert found.sources == expected.sources
    finally:
        region.close()


def test_inputs_that_xxh3_hashes_in_another_way_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"inputs of 240 bytes; expected at least 241"):
        digests(torch.zeros((3, 240), dtype=torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: digests on a GPU are not tested here")
@pytest.mark.parametrize("layer_bytes", [241, 4096, 65537])
def test_digests_on_a_gpu_are_those_of_xxhash(layer_bytes: int) -> None:
    kv = random_bytes((40, 2, layer_bytes), 3)
    device = DeviceRegion(kv.cuda())
    blocks = random.Random(4).sample(range(40), 33)
    cells = CellDigests(len(blocks), 2)
    cell = 0
    while cell < 2 * len(blocks):
        cell = device.ops.fill(device.pages, blocks, cells=cells, start=cell, max_bytes=1)
    expected = [xxhash.xxh3_64_intdigest(kv[block, layer].numpy().tobytes()) for block in blocks for layer in range(2)]
    assert cells.digests.tolist() == expected
