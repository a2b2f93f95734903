"""Source blocks in any order and layer groups: each part goes once, and not before all it is made of is there."""

from __future__ import annotations

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.reshard import Conversion, KVLayout, token_pieces
from kvstore.reshard.progress import Progress

LAYERS = 4
BASE = KVLayout(
    num_layers=LAYERS, num_kv_heads=1, head_lo=0, head_hi=1, block_size=1, head_dim=1, dtype="bfloat16"
)  # fmt: skip
SIZES = st.sampled_from([1, 2, 3, 4, 8])


@settings(deadline=None)
@given(src_size=SIZES, dst_size=SIZES, num_tokens=st.integers(1, 30), data=st.data())
def test_every_part_goes_exactly_once_and_never_too_early(
    src_size: int, dst_size: int, num_tokens: int, data: st.DataObject
) -> None:
    source, destination = (msgspec.structs.replace(BASE, block_size=size) for size in (src_size, dst_size))
    conversion = Conversion.between(source, destination, is_network=False)
    num_blocks = -(-num_tokens // src_size)
    pushes = [(position, layer) for position in range(num_blocks) for layer in range(LAYERS)]
    pushes = data.draw(st.permutations(pushes))[: data.draw(st.integers(0, len(pushes)))]
    progress, here, sent = Progress(conversion), set(), set()
    for position, layer in pushes:
        here.add((position, layer))
        for place, lo, hi in progress.push([(100 + position, position)], layer, layer + 1):
            for at in range(lo, hi):
                assert (place, at) not in sent
                sent.add((place, at))
                pieces = list(token_pieces(src_size, dst_size, place, num_tokens))
                assert sum(piece.num_tokens for piece in pieces) == dst_size, "it goes before the tokens are known"
                assert all((piece.src_index, at) in here for piece in pieces)
    for place, lo, hi in progress.finish([100 + k for k in range(num_blocks)], num_tokens):
        for at in range(lo, hi):
            assert (place, at) not in sent
            sent.add((place, at))
    assert sent == {(p, layer) for p in range(conversion.blocks_for(num_tokens)) for layer in range(LAYERS)}


def test_blocks_go_while_later_ones_are_computed() -> None:
    source, destination = (msgspec.structs.replace(BASE, block_size=size) for size in (16, 32))
    progress = Progress(Conversion.between(source, destination, is_network=False))
    assert list(progress.push([(7, 0), (8, 1)], 0, 2)) == []
    assert list(progress.push([(9, 2)], 0, 2)) == [(0, 0, 2)]
    assert list(progress.push([(7, 0), (8, 1), (9, 2)], 2, 4)) == [(0, 2, 4)]
    assert list(progress.finish([7, 8, 9], 40)) == [(1, 0, 4)]
