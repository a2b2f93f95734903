"""The wire format: a fixed header, then a msgpack body, or for DATA a fixed sub-header and raw page bytes.

    | magic "CKV1" | version u8 | type u8 | flags u16 = 0 | length u32 |  body of `length` bytes       (big-endian)
    DATA body: | grant serial u64 | epoch u64 | first place u32 | places u32 | layer lo u16 | hi u16 |  page runs

A place is a position in the grant, so a writer cannot even name a page that was not granted. Every bound is checked
before memory is taken or a byte is written. All of a connection's frames are in order; that order carries meaning:
FENCED and ABORT come after the last DATA of their transfer.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, Literal, TypeVar

import msgspec

from kvstore.address import KVAddress
from kvstore.reshard.layout import KVLayout
from kvstore.transport.errors import BadFrame
from kvstore.transport.memory import MAX_DEVICES

MAGIC: Final = b"CKV1"
VERSION: Final = 2
HEADER: Final = struct.Struct(">4sBBHI")
DATA_HEADER: Final = struct.Struct(">QQIIHH")
MAX_FETCH_KEYS: Final = 16384
FETCH_PREFIX: Final = "fetch:"  # names of fetches; no transfer is called so


class FrameType(IntEnum):
    HELLO = 1  # writer -> receiver: who I am, whom I want
    CHALLENGE = 2  # <- proof that the receiver knows the secret
    PROOF = 3  # -> proof that the writer does
    WELCOME = 4  # <- shape of the region; with shm also its memfd, with rdma its address, keys and kind of memory
    REJECT = 5  # <- typed end
    HEARTBEAT = 6  # both ways
    RENEW = 7  # -> these transfers are still wanted
    RESERVE = 8  # ->
    GRANT = 9  # <-
    REFUSED = 10  # <- no grant, or no hand-over after COMMIT
    DATA = 11  # -> tcp only
    COMMIT = 12  # ->
    HANDED = 13  # <-
    ABORT = 14  # -> closed at the writer, last write complete
    FENCE = 15  # <-
    FENCED = 16  # -> like ABORT, as the answer to FENCE
    PUSHED = 24  # -> shm only: these pages have been written; the sub-header of DATA, without pages
    FETCH = (
        17  # -> push me what you hold of this prefix; a hint, answered by a RESERVE of the other side, or not at all
    )


Id = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Text = Annotated[str, msgspec.Meta(max_length=256)]
Key = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
KeyId = Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
BlockKey = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31)]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Body(msgspec.Struct, frozen=True, array_like=True):
    """Base of all bodies. Fields are only ever added at the end."""


class Hello(Body, frozen=True, array_like=True):
    incarnation: Id
    target: Id  # the incarnation that the writer wants to reach: an address may have a new owner
    compat: Text
    protocol: Id
    nonce: Key
    keys: Annotated[list[KeyId], msgspec.Meta(min_length=1, max_length=8)]  # of the secrets that I accept
    layout: KVLayout | None = None  # of the writer's KV


class Challenge(Body, frozen=True, array_like=True):
    incarnation: Id
    nonce: Key
    mac: Key
    key: KeyId  # of the secret that both MACs of this handshake are made with


class Proof(Body, frozen=True, array_like=True):
    mac: Key


class Welcome(Body, frozen=True, array_like=True):
    num_blocks: Count
    num_layers: Count
    layer_bytes: Count
    layout: KVLayout | None = None
    address: Annotated[int, msgspec.Meta(ge=0, le=2**62)] = 0  # rdma: of the region, in the receiver's process
    rdma_metadata: Annotated[bytes, msgspec.Meta(max_length=60 << 10)] = b""
    segment: Literal["dram", "vram"] = "dram"  # rdma: whether the region is host memory or a GPU's,
    device: Annotated[int, msgspec.Meta(ge=0, lt=MAX_DEVICES)] = 0  # and of which GPU, as the receiver counts them


class Reject(Body, frozen=True, array_like=True):
    reason: Id
    detail: Text = ""


class Renew(Body, frozen=True, array_like=True):
    xfers: Annotated[list[Id], msgspec.Meta(max_length=1024)]


class Reserve(Body, frozen=True, array_like=True):
    xfer: Id
    rid: Id
    epoch: Epoch
    token: Id
    num_blocks: Count
    group: Annotated[str, msgspec.Meta(max_length=200)] = ""  # of writers that fill the same blocks, each its heads


class GrantBody(Body, frozen=True, array_like=True):
    xfer: Id
    grant_id: Id
    serial: Epoch
    blocks: Annotated[list[Count], msgspec.Meta(max_length=1 << 20)]


class RefusedBody(Body, frozen=True, array_like=True):
    xfer: Id
    reason: Text


class Commit(Body, frozen=True, array_like=True):
    xfer: Id
    grant_id: Id
    epoch: Epoch
    num_tokens: Count
    num_blocks: Count  # of the grant, from its start
    checksum: Annotated[int, msgspec.Meta(ge=0)] | None
    state: bytes
    num_bytes: Annotated[int, msgspec.Meta(ge=0)]
    transfer_s: Annotated[float, msgspec.Meta(ge=0)]


class HandedBody(Body, frozen=True, array_like=True):
    xfer: Id
    transfer_s: Annotated[float, msgspec.Meta(ge=0)] = 0.0  # as the receiver saw it; 0 where it no longer knows


class FenceBody(Body, frozen=True, array_like=True):
    xfer: Id
    grant_id: Id


class FetchBody(Body, frozen=True, array_like=True):
    fetch: Id
    keys: Annotated[list[BlockKey], msgspec.Meta(max_length=MAX_FETCH_KEYS)]  # of a chain of blocks, from its start
    first: Count  # of these, the first that is wanted
    address: KVAddress  # of whoever asks: where the pages shall go


@dataclass(frozen=True, slots=True)
class DataHeader:
    serial: int
    epoch: int
    first: int
    num_places: int
    layer_lo: int
    layer_hi: int


def split(header: DataHeader, max_places: int) -> Iterator[DataHeader]:
    """The same pages in parts of at most `max_places`."""
    for first in range(header.first, header.first + header.num_places, max_places):
        count = min(max_places, header.first + header.num_places - first)
        yield DataHeader(header.serial, header.epoch, first, count, header.layer_lo, header.layer_hi)


_SMALL, _LARGE = 4 << 10, 16 << 20
MAX_LENGTH: Final[dict[FrameType, int]] = {
    **dict.fromkeys(FrameType, _SMALL),
    FrameType.HEARTBEAT: 0,
    FrameType.WELCOME: 64 << 10,
    FrameType.RENEW: 512 << 10,
    FrameType.GRANT: 8 << 20,
    FrameType.FETCH: 512 << 10,
    FrameType.COMMIT: _LARGE,  # carries the prompt's ids
    FrameType.DATA: 1 << 30,  # tightened to the granted bytes by its sub-header
}
T = TypeVar("T", bound=Body)


def frame(kind: FrameType, body: Body | None = None) -> bytes:
    """One control frame."""
    payload = b"" if body is None else msgspec.msgpack.encode(body)
    if len(payload) > MAX_LENGTH[kind]:
        raise BadFrame(reason="length", detail=f"own {kind.name} of {len(payload)} bytes")
    return HEADER.pack(MAGIC, VERSION, kind, 0, len(payload)) + payload


def data_frame(header: DataHeader, num_bytes: int) -> bytes:
    """Header and sub-header of a DATA frame; `num_bytes` of pages follow."""
    h = header
    sub = DATA_HEADER.pack(h.serial, h.epoch, h.first, h.num_places, h.layer_lo, h.layer_hi)
    return HEADER.pack(MAGIC, VERSION, FrameType.DATA, 0, len(sub) + num_bytes) + sub


def pushed_frame(header: DataHeader) -> bytes:
    """Pages of a transfer that may be hashed: they are not written again before the next such frame of them."""
    h = header
    sub = DATA_HEADER.pack(h.serial, h.epoch, h.first, h.num_places, h.layer_lo, h.layer_hi)
    return HEADER.pack(MAGIC, VERSION, FrameType.PUSHED, 0, len(sub)) + sub


def parse_header(raw: bytes | bytearray | memoryview) -> tuple[FrameType, int]:
    """Type and body length.

    Raises:
        BadFrame: bad_magic, version, bad_type or length.
    """
    magic, version, kind, flags, length = HEADER.unpack(raw)
    if magic != MAGIC:
        raise BadFrame(reason="bad_magic", detail=f"{bytes(magic)!r} instead of {MAGIC!r}")
    if version != VERSION:
        raise BadFrame(reason="version", detail=f"protocol version {version}, supported is {VERSION}")
    try:
        kind = FrameType(kind)
    except ValueError:
        raise BadFrame(reason="bad_type", detail=f"frame type {kind}") from None
    if flags:
        raise BadFrame(reason="bad_type", detail=f"reserved flags {flags:#x}")
    if length > MAX_LENGTH[kind] or (kind is FrameType.DATA and length <= DATA_HEADER.size):
        raise BadFrame(reason="length", detail=f"{kind.name} of {length} bytes")
    return kind, length


def parse_body(kind: FrameType, raw: bytes | bytearray, body_type: type[T]) -> T:
    """Raises BadFrame: body."""
    try:
        return msgspec.msgpack.decode(raw, type=body_type)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadFrame(reason="body", detail=f"{kind.name}: {error}") from None


def parse_data_header(raw: bytes | bytearray) -> DataHeader:
    """Raises BadFrame: body."""
    if len(raw) != DATA_HEADER.size:
        raise BadFrame(reason="body", detail=f"{len(raw)} bytes of a page header, expected {DATA_HEADER.size}")
    return DataHeader(*DATA_HEADER.unpack(raw))
