from __future__ import annotations

import pytest

from kvstore.state.keys import (
    BadName,
    checked_name,
    feed_key,
    is_request_id,
    live_key,
    log_key,
    new_request_id,
    record_key,
    shard_of,
)


def test_new_request_id_tells_its_shard() -> None:
    ids = [new_request_id(3) for _ in range(60)]

    assert len(set(ids)) == 60
    assert {shard_of(rid) for rid in ids} == {0, 1, 2}
    assert all(len(rid) == 30 for rid in ids)


def test_all_keys_of_a_request_share_one_slot() -> None:
    keys = [live_key(7), record_key("abc-s07"), log_key("abc-s07", 2), feed_key(7, "gw-1")]

    assert {key[key.index("{") : key.index("}") + 1] for key in keys} == {"{s07}"}


@pytest.mark.parametrize(
    "text", ["", "abc", "abc-s1", "abc-s001", "ABC-s00", "a b-s00", "a{}-s00", "-s00", "abc-s00\n"]
)
def test_text_of_another_form_is_no_request_id(text: str) -> None:
    assert not is_request_id(text)
    with pytest.raises(BadName):
        shard_of(text)


@pytest.mark.parametrize("name", ["", "a=b", "a,b", "a b", "a{b", "a\x00", "x" * 201])
def test_name_that_would_break_the_packed_owners_is_refused(name: str) -> None:
    with pytest.raises(BadName):
        checked_name(name)


def test_names_as_workers_make_them_are_good() -> None:
    assert checked_name("d0@host.example-1a2b3c4d.17") == "d0@host.example-1a2b3c4d.17"
