"""What rank 0 tells the others: who they are, and then each step. Length-prefixed msgpack over a socketpair."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import msgspec
import numpy as np

from engines.attention.backend import AttentionRow
from engines.packed_batch import PackedBatch
from engines.process import EngineConfig

if TYPE_CHECKING:
    import socket

LENGTH: Final = struct.Struct("<I")


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """The first message; the descriptor of the KV region comes with it."""

    config: EngineConfig
    rank: int
    num_ranks: int
    meeting_file: str
    num_blocks: int
    num_layers: int
    layer_bytes: int
    cpus: tuple[int, ...]


class RankStep(msgspec.Struct, frozen=True, array_like=True):
    """One forward pass. Arrays as little-endian int64; `rows` are (start, num_new_tokens, block_table)."""

    ids: bytes
    positions: bytes
    slots: bytes
    rows: list[tuple[int, int, list[int]]]

    @classmethod
    def of(cls, batch: PackedBatch, rows: tuple[AttentionRow, ...]) -> RankStep:
        return cls(
            batch.ids.tobytes(),
            batch.positions.tobytes(),
            batch.slots.tobytes(),
            [(row.start, row.num_new_tokens, row.block_table) for row in rows],
        )

    def batch(self) -> PackedBatch:
        ids, positions, slots = (
            np.frombuffer(raw, dtype=np.int64).copy() for raw in (self.ids, self.positions, self.slots)
        )
        return PackedBatch(ids, positions, slots)

    def attention_rows(self) -> tuple[AttentionRow, ...]:
        return tuple(AttentionRow(*row) for row in self.rows)


encode = msgspec.msgpack.Encoder().encode


def frame(message: RankStart | RankStep) -> bytes:
    body = encode(message)
    return LENGTH.pack(len(body)) + body


def read_exactly(sock: socket.socket, num_bytes: int) -> bytes:
    """Raises EOFError: the other side is gone."""
    parts = bytearray()
    while len(parts) < num_bytes:
        chunk = sock.recv(num_bytes - len(parts))
        if not chunk:
            raise EOFError("rank 0 is gone")
        parts += chunk
    return bytes(parts)


def read_frame(sock: socket.socket) -> bytes:
    """One body. Raises EOFError."""
    (length,) = LENGTH.unpack(read_exactly(sock, LENGTH.size))
    return read_exactly(sock, length)
