from __future__ import annotations

import msgspec
import pytest

from kvstore.reshard import Conversion, HeadShare, Inconvertible, KVLayout, TokenPiece, share_runs, token_pieces

BASE = KVLayout(num_layers=2, num_kv_heads=8, head_lo=0, head_hi=8, block_size=16, head_dim=4, dtype="bfloat16")


def _with(**changes: object) -> KVLayout:
    return msgspec.structs.replace(BASE, **changes)


def test_a_block_of_32_is_made_of_two_of_16() -> None:
    assert list(token_pieces(16, 32, 1, 64)) == [TokenPiece(2, 0, 1, 0, 16), TokenPiece(3, 0, 1, 16, 16)]


def test_a_block_of_48_takes_a_half_and_a_whole_of_32() -> None:
    assert list(token_pieces(32, 48, 1, 96)) == [TokenPiece(1, 16, 1, 0, 16), TokenPiece(2, 0, 1, 16, 32)]


def test_behind_the_last_token_nothing_is_taken() -> None:
    assert list(token_pieces(16, 32, 0, 17)) == [TokenPiece(0, 0, 0, 0, 16), TokenPiece(1, 0, 0, 16, 1)]
    assert list(token_pieces(32, 16, 3, 40)) == []


def test_a_pair_moves_the_heads_that_both_ranks_hold() -> None:
    source, destination = _with(head_lo=2, head_hi=4), _with(head_lo=0, head_hi=4)
    assert Conversion.between(source, destination, is_network=False).share == HeadShare(0, 2, 2)
    assert Conversion.between(destination, source, is_network=False).share == HeadShare(2, 0, 2)


def test_a_head_slice_is_two_runs_per_layer_and_a_whole_block_is_one() -> None:
    layout = _with(head_lo=0, head_hi=4)  # a head: 16 tokens x 4 x 2 bytes
    assert share_runs(layout, HeadShare(0, 2, 2), 0, 2) == [(256, 256), (768, 256), (1280, 256), (1792, 256)]
    assert share_runs(layout, HeadShare(0, 0, 4), 1, 2) == [(1024, 1024)]


@pytest.mark.parametrize("name", ["num_layers", "num_kv_heads", "head_dim"])
def test_what_must_agree_is_refused_with_the_values_of_both(name: str) -> None:
    ours = getattr(BASE, name)
    with pytest.raises(Inconvertible, match=f"{name}: writer has {ours}, receiver has {ours * 2}"):
        Conversion.between(BASE, _with(**{name: ours * 2}), is_network=False)


def test_ranks_without_a_common_head_are_refused() -> None:
    with pytest.raises(Inconvertible, match=r"heads: writer has \[0, 4\), receiver has \[4, 8\)"):
        Conversion.between(_with(head_hi=4), _with(head_lo=4), is_network=False)


@pytest.mark.parametrize("source", ["bfloat16", "float32"])
def test_float16_takes_only_its_own_kind(source: str) -> None:
    with pytest.raises(Inconvertible, match=f"dtype: writer has {source}, receiver has float16"):
        Conversion.between(_with(dtype=source), _with(dtype="float16"), is_network=False)
    Conversion.between(_with(dtype="float16"), _with(dtype=source), is_network=False)


def test_only_pages_that_are_the_same_bytes_are_plain() -> None:
    assert Conversion.between(BASE, BASE, is_network=True).is_plain
    for other in (_with(block_size=32), _with(dtype="float32"), _with(head_hi=4)):
        assert not Conversion.between(BASE, other, is_network=True).is_plain
        assert not Conversion.between(other, BASE, is_network=True).is_plain


def test_compression_is_used_on_a_network_where_both_ask_for_it() -> None:
    asking = _with(compression="int8")
    assert Conversion.between(asking, asking, is_network=True).compression == "int8"
    assert Conversion.between(asking, asking, is_network=False).is_plain
    assert Conversion.between(asking, BASE, is_network=True).is_plain
    assert Conversion.between(BASE, asking, is_network=True).is_plain


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_kv_heads": 1 << 17},
        {"head_lo": 4, "head_hi": 4},
        {"head_hi": 9},
        {"block_size": 1 << 16, "head_dim": 1 << 16},
        {"block_size": -1},
        {"dtype": "float8"},
        {"compression": "zip"},
    ],
)
def test_a_peers_layout_out_of_bounds_is_not_decoded(change: dict[str, object]) -> None:
    fields = {name: getattr(BASE, name) for name in BASE.__struct_fields__} | change
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(list(fields.values())), type=KVLayout)
