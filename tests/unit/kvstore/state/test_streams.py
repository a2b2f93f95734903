from __future__ import annotations

import msgspec

from kvstore.state.entries import FeedItem, TokenEntry
from kvstore.state.hashing import hash_of, roll
from kvstore.state.streams import feed_head


def test_feed_head_becomes_a_feed_item_with_two_more_fields() -> None:
    prefix_hash = hash_of([1, 2, 3])
    packed = feed_head("abc-s00", 2, 70_000, prefix_hash) + b"\xc4\x02hi" + b"\xc4\x00"

    assert msgspec.msgpack.decode(packed, type=FeedItem) == FeedItem("abc-s00", 2, 70_000, prefix_hash, b"hi", b"")


def test_prefix_hash_fits_a_signed_integer_and_goes_on_from_any_position() -> None:
    ids = [0, 5, 2**31 - 1, 7]

    assert hash_of([]) == 0
    assert 0 <= hash_of(ids) < 2**63
    assert hash_of(ids[2:], start=hash_of(ids[:2])) == hash_of(ids) == roll(hash_of(ids[:3]), 7)


def test_entry_that_is_cut_keeps_ids_and_texts_together() -> None:
    entry = TokenEntry(4, 0, (10, 11, 12), ("a", "", "bc"))

    assert entry.cut(6, 9) == TokenEntry(6, 9, (12,), ("bc",))
