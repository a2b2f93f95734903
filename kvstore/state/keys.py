"""Names of keys, and how a request id tells its shard. The functions compute the same names (lua/base.lua)."""

from __future__ import annotations

import base64
import os
import random
import re
from typing import Final

PREFIX: Final = "cel:"
REGISTRY_KEY: Final = "cel:{w}:workers"

_REQUEST_ID = re.compile(r"[0-9a-z]{1,64}-s(\d\d)")
_NAME = re.compile(r"[^\s=,{}\x00-\x1f]{1,200}")


class BadName(ValueError):
    """A name that would break a key or the packed field of owners. A bug of the caller, never user input."""


def new_request_id(num_shards: int) -> str:
    """A random request id: 26 base32 characters (128 bits) and its shard."""
    letters = base64.b32encode(os.urandom(16)).decode().rstrip("=").lower()
    return f"{letters}-s{random.randrange(num_shards):02d}"


def shard_of(rid: str) -> int:
    """The shard that a request id names.

    Raises:
        BadName: not `<id>-sNN`.
    """
    match = _REQUEST_ID.fullmatch(rid)
    if match is None:
        raise BadName(f"request id {rid!r} has another form than <lower-case letters and digits>-sNN")
    return int(match.group(1))


def is_request_id(text: str) -> bool:
    """Whether `text`, which may come from anybody, has the form of a request id."""
    return _REQUEST_ID.fullmatch(text) is not None


def checked_name(name: str) -> str:
    """An owner token, incarnation or gateway name that is safe in keys and in the field `owners`.

    Raises:
        BadName: empty, too long, or with white space, `=`, `,`, `{` or `}` in it.
    """
    if _NAME.fullmatch(name) is None:
        raise BadName(f"name {name!r} is empty, longer than 200, or holds white space or one of = , {{ }}")
    return name


def live_key(shard: int) -> str:
    """The key that every function of a request takes: it routes the call, the others are computed from it."""
    return f"{PREFIX}{{s{shard:02d}}}:live"


def record_key(rid: str) -> str:
    return f"{PREFIX}{{s{shard_of(rid):02d}}}:req:{rid}"


def log_key(rid: str, c: int) -> str:
    return f"{PREFIX}{{s{shard_of(rid):02d}}}:log:{rid}:{c}"


def feed_key(shard: int, gateway: str) -> str:
    return f"{PREFIX}{{s{shard:02d}}}:feed:{gateway}"
