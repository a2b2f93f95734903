"""Workers that keep KV differently: other block sizes and dtypes, compression on the wire; or a refusal by name."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from kvstore.reshard import Conversion, KVLayout
from kvstore.reshard.dtypes import to_bfloat16, to_float32
from kvstore.reshard.pack import blocks_as_words
from kvstore.transport import Arrived, BlocksFree, GrantReceived, GrantRefused, Handed, PushFailed, ReserveRequested
from tests.contract.transport_helpers import End, FlippingRelay

LAYOUT = KVLayout(
    num_layers=3, num_kv_heads=2, head_lo=0, head_hi=2, block_size=16, head_dim=8, dtype="bfloat16"
)  # fmt: skip
POISON = 0x7FC1  # a NaN
MakeEnd = Callable[..., End]


@pytest.fixture(params=["shm", "tcp"])
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_end(protocol: str, tmp_path: Path) -> Iterator[MakeEnd]:
    with contextlib.ExitStack() as stack:

        def make(name: str, **changes: object) -> End:
            end = End(name, str(tmp_path), [protocol], layout=msgspec.structs.replace(LAYOUT, **changes))
            stack.callback(end.close)
            return end

        yield make


def _kv(num_tokens: int) -> NDArray[np.uint16]:
    """bfloat16 words `[num_tokens, layers, 2, heads, head_dim]`, no two tokens alike."""
    values = np.random.default_rng(num_tokens).standard_normal((num_tokens, 3, 2, 2, 8)).astype(np.float32)
    return to_bfloat16(values)  # type: ignore[no-any-return]


def _as(words: NDArray[np.uint16], dtype: str) -> NDArray[np.generic]:
    return to_float32(words, "bfloat16").view(np.uint32) if dtype == "float32" else words


def _put(end: End, layout: KVLayout, blocks: list[int], kv: NDArray[np.uint16]) -> None:
    """Tokens into blocks; the rest of the region is poison."""
    pages = blocks_as_words(end.region.buffer, layout)
    pages[:] = POISON << 16 if layout.dtype == "float32" else POISON
    for token, words in enumerate(_as(kv, layout.dtype)):
        pages[blocks[token // layout.block_size], :, :, :, token % layout.block_size] = words


def _get(end: End, layout: KVLayout, blocks: list[int]) -> NDArray[np.generic]:
    """All tokens that blocks have room for."""
    pages = blocks_as_words(end.region.buffer, layout)
    size = layout.block_size
    return np.stack([pages[block, :, :, :, at] for block in blocks for at in range(size)])


def _transfer(writer: End, reader: End, own: list[int], size: int, num_tokens: int, granted: list[int]) -> Arrived:
    """As an engine does it: layer groups of some blocks, then of the rest, then the end."""
    writer.reserve(reader.address, "w:1", len(own), num_tokens=num_tokens)
    request = reader.wait(ReserveRequested)
    assert request.num_blocks == len(granted)
    reader.node.grant(request, granted)
    writer.wait(GrantReceived)
    num_whole = num_tokens // size // 2
    pairs = [(block, at) for at, block in enumerate(own)]
    for part in (pairs[:num_whole], pairs[num_whole:]):
        for lo, hi in ((0, 2), (2, 3)):
            if part:
                writer.node.push("w:1", part, lo, hi)
    writer.node.commit("w:1", src_blocks=own, num_tokens=num_tokens, state=b"s")
    return reader.wait(Arrived)


@pytest.mark.parametrize(
    ("source", "destination"),
    [
        ({"block_size": 16}, {"block_size": 32}),
        ({"block_size": 32}, {"block_size": 16}),
        ({"block_size": 32}, {"block_size": 48}),
        ({"block_size": 8}, {"block_size": 64}),
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"dtype": "float32", "block_size": 8}, {"dtype": "bfloat16", "block_size": 32}),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 16, 33, 64, 130])
def test_every_token_arrives_in_the_receivers_layout_and_the_tail_is_zero(
    make_end: MakeEnd, source: dict[str, object], destination: dict[str, object], num_tokens: int
) -> None:
    ours, theirs = (msgspec.structs.replace(LAYOUT, **changes) for changes in (source, destination))
    writer, reader = make_end("writer", **source), make_end("reader", **destination)
    own = list(range(1, 1 + -(-num_tokens // ours.block_size)))[::-1]
    granted = [3 * k % reader.region.num_blocks for k in range(1, -(-num_tokens // theirs.block_size) + 1)]
    kv = _kv(num_tokens)
    _put(writer, ours, own, kv)
    before = bytes(reader.region.block(0))

    arrived = _transfer(writer, reader, own, ours.block_size, num_tokens, granted)

    assert (arrived.num_tokens, arrived.blocks) == (num_tokens, tuple(granted))
    got = _get(reader, theirs, granted)
    assert (got[:num_tokens] == _as(kv, theirs.dtype)).all()
    assert not got[num_tokens:].any(), "something of the writer's tail arrived"
    assert bytes(reader.region.block(0)) == before, "a block that was not granted was written"
    reader.node.settle("w:1", True)
    writer.wait(Handed)
    reader.node.check_invariants()


def test_float32_is_rounded_to_the_nearest_bfloat16(make_end: MakeEnd) -> None:
    ours = msgspec.structs.replace(LAYOUT, dtype="float32")
    writer, reader = make_end("writer", dtype="float32"), make_end("reader")
    words = blocks_as_words(writer.region.buffer, ours)
    exact = np.random.default_rng(5).standard_normal(words[:2].shape).astype(np.float32)
    words[:2] = exact.view(np.uint32)
    _transfer(writer, reader, [0, 1], 16, 32, [4, 5])
    got = to_float32(blocks_as_words(reader.region.buffer, LAYOUT)[[4, 5]], "bfloat16")
    error = np.abs(got - exact)
    assert error.max() > 0
    assert (error <= np.abs(exact) * 2**-8).all()


@pytest.mark.parametrize(("kind", "step"), [("int8", 0.5 / 127), ("fp8", 1 / 16)])
def test_compressed_kv_is_expanded_where_it_arrives_and_only_on_a_network(
    make_end: MakeEnd, protocol: str, kind: str, step: float
) -> None:
    writer, reader = make_end("writer", compression=kind), make_end("reader", compression=kind, block_size=32)
    kv = _kv(70)
    _put(writer, LAYOUT, [5, 4, 3, 2, 1], kv)
    arrived = _transfer(writer, reader, [5, 4, 3, 2, 1], 16, 70, [7, 9, 2])

    got = _get(reader, msgspec.structs.replace(LAYOUT, block_size=32), [7, 9, 2])
    assert not got[70:].any()
    exact, after = to_float32(kv, "bfloat16"), to_float32(got[:70], "bfloat16")
    if protocol == "shm":
        assert (got[:70] == kv).all()
        return
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    assert np.abs(after - exact).max() > 0
    assert (np.abs(after - exact) <= largest * (step + 2**-8)).all()
    whole_bytes = 3 * reader.region.block_bytes
    assert arrived.num_bytes == whole_bytes * (8 + 4) // 16  # 8 values and a scale, for 8 bfloat16


def test_one_side_alone_does_not_compress(make_end: MakeEnd) -> None:
    writer, reader = make_end("writer", compression="int8"), make_end("reader")
    kv = _kv(16)
    _put(writer, LAYOUT, [5], kv)
    _transfer(writer, reader, [5], 16, 16, [7])
    assert (_get(reader, LAYOUT, [7]) == kv).all()


def test_a_bit_that_flips_between_copy_and_check_never_arrives(make_end: MakeEnd, protocol: str) -> None:
    """shm: in the page itself. tcp: on the wire."""
    writer, reader = make_end("writer"), make_end("reader", block_size=32)
    kv = _kv(40)
    _put(writer, LAYOUT, [0, 1, 2], kv)
    with contextlib.ExitStack() as stack:
        if protocol == "tcp":
            relay = stack.enter_context(FlippingRelay(reader.address.tcp_port, at_byte=3000))
            reader.address = msgspec.structs.replace(reader.address, tcp_port=relay.port)
        writer.reserve(reader.address, "w:1", 3)
        reader.node.grant(reader.wait(ReserveRequested), [5, 6])
        writer.wait(GrantReceived)
        writer.node.push("w:1", [(0, 0), (1, 1), (2, 2)], 0, 3)
        if protocol == "shm":
            ends_s = time.monotonic() + 5
            while not (_get(reader, msgspec.structs.replace(LAYOUT, block_size=32), [5]) == kv[:32]).all():
                assert time.monotonic() < ends_s, "the push did not land"
                time.sleep(0.01)
            reader.region.block(5)[100] ^= 1
        writer.node.commit("w:1", src_blocks=[0, 1, 2], num_tokens=40, state=b"")
        assert writer.wait(PushFailed).reason == "checksum"
        assert reader.wait(BlocksFree).blocks == (5, 6)


def test_a_block_that_is_not_the_committed_one_is_replaced(make_end: MakeEnd) -> None:
    writer, reader = make_end("writer"), make_end("reader", block_size=32)
    kv = _kv(64)
    _put(writer, LAYOUT, [0, 1, 2, 3], kv)
    writer.reserve(reader.address, "w:1", 4)
    reader.node.grant(reader.wait(ReserveRequested), [5, 6])
    writer.wait(GrantReceived)
    writer.node.push("w:1", [(0, 0), (9, 1), (2, 2), (8, 3)], 0, 3)
    writer.node.push("w:1", [(7, 1)], 1, 2)
    writer.node.commit("w:1", src_blocks=[0, 1, 2, 3], num_tokens=64, state=b"")
    reader.wait(Arrived)
    assert (_get(reader, msgspec.structs.replace(LAYOUT, block_size=32), [5, 6]) == kv).all()


@pytest.mark.parametrize(
    ("source", "destination", "detail"),
    [
        ({}, {"head_dim": 16}, "head_dim: writer has 8, receiver has 16"),
        ({}, {"num_layers": 4}, "num_layers: writer has 3, receiver has 4"),
        ({}, {"num_kv_heads": 4, "head_hi": 4}, "num_kv_heads: writer has 2, receiver has 4"),
        ({}, {"dtype": "float16"}, "dtype: writer has bfloat16, receiver has float16"),
        ({"head_hi": 1}, {"head_lo": 1}, "heads: writer has [0, 1), receiver has [1, 2)"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_values_of_both(
    make_end: MakeEnd, source: dict[str, object], destination: dict[str, object], detail: str
) -> None:
    writer, reader = make_end("writer", **source), make_end("reader", **destination)
    writer.reserve(reader.address, "w:1", 2)
    refused = writer.wait(GrantRefused)
    assert refused.reason == "layout"
    assert detail in refused.detail
    assert reader.node.rejects() == {"layout": 1}
    assert not reader.sees(ReserveRequested, within_s=0.1)


def test_pages_that_a_link_does_not_convert_are_moved_as_before(make_end: MakeEnd) -> None:
    assert Conversion.between(LAYOUT, LAYOUT, is_network=True).is_plain
    writer, reader = make_end("writer"), make_end("reader")
    _put(writer, LAYOUT, [1], _kv(16))
    _transfer(writer, reader, [1], 16, 16, [2])
    assert reader.region.block(2) == writer.region.block(1)
