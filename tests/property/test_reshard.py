"""KV of any layout becomes KV of any other that fits: against the whole KV as one array, cut anew."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvstore.reshard import Conversion, KVLayout, share_runs
from kvstore.reshard.dtypes import WORD_TYPES
from kvstore.reshard.pack import Packer, blocks_as_words, share_of_block

BLOCK_SIZES = st.sampled_from([1, 2, 3, 4, 5, 8, 16])
RANKS = st.sampled_from([(1, 1), (2, 1), (1, 2), (4, 2), (2, 4), (8, 4), (3, 2)])
HEADS = 24  # every count of ranks above divides it
DIM, LAYERS = 2, 3


def _layout(rank: int, num_ranks: int, block_size: int, dtype: str) -> KVLayout:
    per_rank = HEADS // num_ranks
    return KVLayout(
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_lo=rank * per_rank,
        head_hi=(rank + 1) * per_rank,
        block_size=block_size,
        head_dim=DIM,
        dtype=dtype,  # type: ignore[arg-type]
    )


def _region(layout: KVLayout, num_blocks: int, word: int) -> NDArray[np.uint8]:
    region = np.empty(num_blocks * LAYERS * layout.layer_bytes, dtype=np.uint8)
    region.view(WORD_TYPES[layout.dtype])[:] = word
    return region


def _fill_source(region: NDArray[np.uint8], layout: KVLayout, table: list[int], whole: NDArray[np.uint32]) -> None:
    """Token by token: slow and plain."""
    blocks = blocks_as_words(memoryview(region), layout)
    for token in range(len(whole)):
        block = table[token // layout.block_size]
        blocks[block, :, :, :, token % layout.block_size] = whole[token, :, :, layout.head_lo : layout.head_hi]


@settings(deadline=None, max_examples=150)
@given(
    ranks=RANKS,
    src_size=BLOCK_SIZES,
    dst_size=BLOCK_SIZES,
    num_tokens=st.integers(1, 40),
    cut=st.integers(0, LAYERS),
    random=st.randoms(use_true_random=False),
)
def test_each_byte_comes_from_its_place_and_the_tail_is_zero(
    ranks: tuple[int, int], src_size: int, dst_size: int, num_tokens: int, cut: int, random: object
) -> None:
    num_sources, num_destinations = ranks
    whole = np.arange(1, num_tokens * LAYERS * 2 * HEADS * DIM + 1, dtype=np.uint32)
    whole = whole.reshape(num_tokens, LAYERS, 2, HEADS, DIM)
    num_src_blocks, num_dst_blocks = -(-num_tokens // src_size), -(-num_tokens // dst_size)
    src_table, dst_table = list(range(num_src_blocks + 2)), list(range(num_dst_blocks + 2))
    random.shuffle(src_table)  # type: ignore[attr-defined]
    random.shuffle(dst_table)  # type: ignore[attr-defined]
    table = dict(enumerate(src_table[:num_src_blocks]))

    regions = []
    for d in range(num_destinations):
        destination = _layout(d, num_destinations, dst_size, "float32")
        regions.append(_region(destination, num_dst_blocks + 2, 0xBADBAD))
    for s in range(num_sources):
        source = _layout(s, num_sources, src_size, "float32")
        poisoned = _region(source, num_src_blocks + 2, 0xDEAD)
        _fill_source(poisoned, source, src_table, whole)
        for d, region in enumerate(regions):
            destination = _layout(d, num_destinations, dst_size, "float32")
            if max(source.head_lo, destination.head_lo) >= min(source.head_hi, destination.head_hi):
                continue
            conversion = Conversion.between(source, destination, is_network=False)
            packer = Packer(conversion, memoryview(poisoned))
            pages = blocks_as_words(memoryview(region), destination)
            for place in range(conversion.blocks_for(num_tokens)):
                for lo, hi in ((0, cut), (cut, LAYERS)):
                    if lo < hi:
                        out = share_of_block(pages, dst_table[place], conversion.share, lo, hi)
                        packer.fill(out, table, place, num_tokens, lo, hi)
                block_bytes = LAYERS * destination.layer_bytes
                block = region[dst_table[place] * block_bytes :][:block_bytes]
                runs = share_runs(destination, conversion.share, 0, LAYERS)
                wire = np.empty(LAYERS * conversion.wire_layer_bytes, dtype=np.uint8)
                packer.pack(wire, table, place, num_tokens, 0, LAYERS)
                assert b"".join(bytes(block[at : at + size]) for at, size in runs) == bytes(wire)

    for d, region in enumerate(regions):
        destination = _layout(d, num_destinations, dst_size, "float32")
        pages = blocks_as_words(memoryview(region), destination)
        for token in range(num_dst_blocks * dst_size):
            got = pages[dst_table[token // dst_size], :, :, :, token % dst_size]
            if token < num_tokens:
                assert (got == whole[token, :, :, destination.head_lo : destination.head_hi]).all()
            else:
                assert not got.any(), "something of the source's tail"
        for block in dst_table[num_dst_blocks:]:
            assert (pages[block] == 0xBADBAD).all(), "a block that was not asked for"


@settings(deadline=None, max_examples=60)
@given(src_size=BLOCK_SIZES, dst_size=BLOCK_SIZES, num_tokens=st.integers(1, 20), seed=st.integers(0, 1000))
def test_bfloat16_goes_to_float32_and_back_unchanged_over_any_block_sizes(
    src_size: int, dst_size: int, num_tokens: int, seed: int
) -> None:
    narrow, wide = _layout(0, 1, src_size, "bfloat16"), _layout(0, 1, dst_size, "float32")
    num_src_blocks, num_dst_blocks = -(-num_tokens // src_size), -(-num_tokens // dst_size)
    random = np.random.default_rng(seed)
    source = random.integers(0, 0x7F00, num_src_blocks * LAYERS * narrow.layer_bytes // 2, dtype=np.uint16)
    middle = np.zeros(num_dst_blocks * LAYERS * wide.layer_bytes, dtype=np.uint8)
    back = np.zeros_like(source)

    there = Packer(Conversion.between(narrow, wide, is_network=False), memoryview(source.view(np.uint8)))
    pages = blocks_as_words(memoryview(middle), wide)
    for place in range(num_dst_blocks):
        there.fill(pages[place], {i: i for i in range(num_src_blocks)}, place, num_tokens, 0, LAYERS)
    again = Packer(Conversion.between(wide, narrow, is_network=False), memoryview(middle))
    pages = blocks_as_words(memoryview(back.view(np.uint8)), narrow)
    for place in range(num_src_blocks):
        again.fill(pages[place], {i: i for i in range(num_dst_blocks)}, place, num_tokens, 0, LAYERS)

    blocks = blocks_as_words(memoryview(source.view(np.uint8)), narrow)
    for token in range(num_tokens):
        block, offset = divmod(token, src_size)
        assert (pages[block, :, :, :, offset] == blocks[block, :, :, :, offset]).all()
