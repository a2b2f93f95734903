"""Handles of prefixes: who keeps the KV of how many tokens, by the hash of the last block. Signed, short-lived hints.

    cel:{w}:kv:<handle>     hash { body, mac }, with a TTL          handle = <compat of the workers>:<block key, hex>

A handle says where to ask; what comes is checked like any KV. The signature keeps those who can write to the state
server but do not know the cluster secret from sending workers to addresses of their own.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from kvstore.address import KVAddress
from kvstore.state.keys import PREFIX

if TYPE_CHECKING:
    from kvstore.state.connection import Connection

TTL_S: Final = 300
MAX_SKEW_S: Final = 60  # by how much the clocks of two hosts may differ

_encode = msgspec.msgpack.Encoder().encode


class PrefixHandle(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes:
    name: `handle_name` of its last block; inside the signature, so that no handle can be filed under another name.
    num_blocks: of the chain, up to and with that block.
    expires_s: Unix time.
    """

    name: str
    num_blocks: int
    num_tokens: int
    address: KVAddress
    expires_s: float


_decode = msgspec.msgpack.Decoder(PrefixHandle).decode


def handle_name(compat: str, key: bytes) -> str:
    """The name of the prefix that ends with the block `key`, among workers that agree on `compat`."""
    return f"{compat}:{key.hex()}"


def sign(handle: PrefixHandle, secret: bytes) -> tuple[bytes, bytes]:
    """Body and MAC, as they are stored."""
    body = _encode(handle)
    return body, _mac(body, secret)


def verify(name: str, body: bytes, mac: bytes, secrets: Sequence[bytes], now_s: float) -> PrefixHandle | None:
    """The handle, or None: forged, expired, or of another prefix."""
    if not any(hmac.compare_digest(mac, _mac(body, secret)) for secret in secrets):
        return None
    try:
        handle = _decode(body)
    except msgspec.MsgspecError:
        return None
    is_current = handle.expires_s >= now_s - MAX_SKEW_S
    return handle if handle.name == name and is_current else None


def put(connection: Connection, handles: Sequence[PrefixHandle], secret: bytes) -> None:
    """File all of them, in one pipeline; the last writer of a name wins."""
    commands: list[Sequence[str | bytes | int]] = []
    for handle in handles:
        body, mac = sign(handle, secret)
        commands.append(("HSET", _key(handle.name), "body", body, "mac", mac))
        commands.append(("EXPIRE", _key(handle.name), TTL_S))
    if commands:
        connection.pipeline(commands)


def find(connection: Connection, names: Sequence[str], secrets: Sequence[bytes], now_s: float) -> PrefixHandle | None:
    """The first of `names` that has a handle worth asking, in one pipeline."""
    replies = connection.pipeline([("HMGET", _key(name), "body", "mac") for name in names]) if names else []
    for name, (body, mac) in zip(names, replies, strict=True):
        if body is not None and mac is not None:
            handle = verify(name, body, mac, secrets, now_s)
            if handle is not None:
                return handle
    return None


def _key(name: str) -> str:
    return f"{PREFIX}{{w}}:kv:{name}"


def _mac(body: bytes, secret: bytes) -> bytes:
    return hmac.digest(secret, b"celeriac prefix handle\x00" + body, hashlib.sha256)
