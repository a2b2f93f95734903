"""Reading logs and feeds, and the packed head of a feed item."""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from kvstore.errors import BadRecord
from kvstore.state.connection import Connection
from kvstore.state.entries import FeedItem, FinEntry, TokenEntry
from kvstore.state.keys import feed_key, log_key
from kvstore.state.replies import Log

_log = logging.getLogger(__name__)

_encode = msgspec.msgpack.Encoder().encode
_decode_tokens = msgspec.msgpack.Decoder(TokenEntry).decode
_decode_fin = msgspec.msgpack.Decoder(FinEntry).decode
_decode_feed = msgspec.msgpack.Decoder(list[FeedItem]).decode


def feed_head(rid: str, c: int, n: int, prefix_hash: int) -> bytes:
    """A packed FeedItem without its last two fields: the function appends them (a Lua number cannot hold the hash)."""
    head = _encode((rid, c, n, prefix_hash))
    return b"\x96" + head[1:]


def read_log(connection: Connection, rid: str, c: int, after_n: int) -> Log:
    """What a reader that holds `after_n` tokens of choice `c` lacks; the first entry may begin before that.

    Raises:
        BadRecord: an entry is garbled.
    """
    return _log_from(rid, connection.command("XRANGE", log_key(rid, c), f"({after_n}-0" if after_n else "-", "+"))


def read_ids(connection: Connection, rid: str, k: int) -> list[list[int]]:
    """All output ids so far of each of `k` choices, in one round trip.

    Raises:
        BadRecord: an entry is garbled, or the log has a gap.
    """
    choices: list[list[int]] = []
    for reply in connection.pipeline([("XRANGE", log_key(rid, c), "-", "+") for c in range(k)]):
        ids: list[int] = []
        for entry in _log_from(rid, reply).entries:
            if entry.index != len(ids):
                raise BadRecord(rid=rid, why=f"the log goes on at {entry.index} behind {len(ids)} tokens")
            ids.extend(entry.token_ids)
        choices.append(ids)
    return choices


def read_feed(connection: Connection, gateway: str, cursors: dict[int, str], block_ms: int) -> list[FeedItem]:
    """New hints for `gateway`; moves `cursors` (shard -> last id read; a new gateway starts with "0-0").

    Hints may be lost: an unreadable one is skipped.
    """
    positions = {feed_key(shard, gateway): cursor for shard, cursor in cursors.items()}
    shards = {feed_key(shard, gateway): shard for shard in cursors}
    items: list[FeedItem] = []
    for stream, entries in connection.read_streams(positions, block_ms=block_ms) or ():
        for entry_id, fields in entries:
            cursors[shards[stream.decode()]] = entry_id.decode()
            try:
                items.extend(_decode_feed(_field(fields, b"d")))
            except (msgspec.DecodeError, KeyError) as error:
                _log.warning("feed of %s: skipped unreadable entry %s: %s", gateway, entry_id, error)
    return items


def _log_from(rid: str, reply: Any) -> Log:
    entries: list[TokenEntry] = []
    fin: FinEntry | None = None
    try:
        for entry_id, fields in reply or ():
            if entry_id.endswith(b"-0"):
                entries.append(_decode_tokens(_field(fields, b"t")))
            else:
                fin = _decode_fin(_field(fields, b"f"))
    except (msgspec.DecodeError, KeyError) as error:
        raise BadRecord(rid=rid, why=f"unreadable entry in the log: {error}") from error
    return Log(entries, fin)


def _field(fields: Any, name: bytes) -> bytes:
    """One field of a stream entry: redis-py gives a dict for known commands, a flat list elsewhere."""
    pairs = fields if isinstance(fields, dict) else dict(zip(fields[::2], fields[1::2], strict=True))
    value: bytes = pairs[name]
    return value
