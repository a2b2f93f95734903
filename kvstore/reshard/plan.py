"""Which bytes of which source blocks make which bytes of which destination blocks. Pure.

    heads    source rank  [ 0 1 2 3 | 4 5 6 7 ]        a pair moves the heads that both of its ranks hold: `HeadShare`
             destination  [ 0 1 | 2 3 | 4 5 | 6 7 ]
    tokens   source, 16   [ 0..15 | 16..31 | 32..47 ]  a destination block is made of pieces of source blocks
             destination  [ 0..31          | 32..63 ]  `TokenPiece`; what lies behind the last token is zeros
    layers   the same on both sides

A share of a destination block is one run of bytes per layer for keys and one for values: `share_runs`.
After the layout maps of DistServe (OSDI 2024) and of the field's unequal tensor-parallel hand-offs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from kvstore.reshard.errors import Inconvertible
from kvstore.reshard.layout import KVLayout

_MUST_AGREE: Final = ("num_layers", "num_kv_heads", "head_dim")


@dataclass(frozen=True, slots=True)
class HeadShare:
    """Heads that a source and a destination rank both hold; positions within each rank's own slice."""

    src_lo: int
    dst_lo: int
    num_heads: int


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """Tokens that go on one after the other in a source block and in a destination block.

    `src_index` is a position in the source's block table, `dst_place` one in the grant.
    """

    src_index: int
    src_token: int
    dst_place: int
    dst_token: int
    num_tokens: int


def head_share(source: KVLayout, destination: KVLayout) -> HeadShare:
    """What of the destination's heads comes from this source.

    Raises:
        Inconvertible: layers, heads in all or head size differ, no head is held by both, or a dtype has no conversion.
    """
    for name in _MUST_AGREE:
        ours, theirs = getattr(source, name), getattr(destination, name)
        if ours != theirs:
            raise Inconvertible(name=name, source=ours, destination=theirs)
    lo, hi = max(source.head_lo, destination.head_lo), min(source.head_hi, destination.head_hi)
    if lo >= hi:
        raise Inconvertible(
            name="heads",
            source=f"[{source.head_lo}, {source.head_hi})",
            destination=f"[{destination.head_lo}, {destination.head_hi})",
        )
    if destination.dtype == "float16" != source.dtype:  # its range is smaller: large values would become infinite
        raise Inconvertible(name="dtype", source=source.dtype, destination=destination.dtype)
    return HeadShare(lo - source.head_lo, lo - destination.head_lo, hi - lo)


def token_pieces(src_size: int, dst_size: int, dst_place: int, num_tokens: int) -> Iterator[TokenPiece]:
    """The pieces of destination block `dst_place`, in order; block sizes in tokens.

    Args:
        num_tokens: of the sequence. What the block has behind them comes from nowhere.
    """
    token = dst_place * dst_size
    end = min(token + dst_size, num_tokens)
    while token < end:
        src_index, src_token = divmod(token, src_size)
        length = min(src_size - src_token, end - token)
        yield TokenPiece(src_index, src_token, dst_place, token - dst_place * dst_size, length)
        token += length


def share_runs(layout: KVLayout, share: HeadShare, layer_lo: int, layer_hi: int) -> list[tuple[int, int]]:
    """(offset in the destination block, bytes) of the share's runs in layers [lo, hi), neighbours joined."""
    num_bytes = share.num_heads * layout.head_bytes
    if share.num_heads == layout.num_heads:
        return [(layer_lo * layout.layer_bytes, (layer_hi - layer_lo) * layout.layer_bytes)]
    first = share.dst_lo * layout.head_bytes
    half = layout.num_heads * layout.head_bytes  # all keys of a layer, or all its values
    return [(row * half + first, num_bytes) for row in range(2 * layer_lo, 2 * layer_hi)]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What one link does to the KV that goes over it: from `source`'s layout into `share` of `destination`'s."""

    source: KVLayout
    destination: KVLayout
    share: HeadShare
    compression: str  # on this link

    @classmethod
    def between(cls, source: KVLayout, destination: KVLayout, *, is_network: bool) -> Conversion:
        """Raises Inconvertible: by name, with the values of both sides."""
        is_agreed = is_network and source.compression == destination.compression
        return cls(source, destination, head_share(source, destination), source.compression if is_agreed else "none")

    @property
    def is_plain(self) -> bool:
        """The bytes of a block are the same on both sides, and so they go over the wire."""
        source, destination = self.source, self.destination
        is_same_block = (source.block_size, source.dtype) == (destination.block_size, destination.dtype)
        return is_same_block and self.is_whole and source.num_heads == self.share.num_heads and not self.is_compressed

    @property
    def is_whole(self) -> bool:
        """This source alone fills all of the destination's heads."""
        return self.share.num_heads == self.destination.num_heads

    @property
    def is_compressed(self) -> bool:
        return self.compression != "none"

    @property
    def share_layer_bytes(self) -> int:
        """Of the destination's pages: what this source writes of one layer of a block."""
        return 2 * self.share.num_heads * self.destination.head_bytes

    @property
    def wire_layer_bytes(self) -> int:
        """On the wire, for one layer of a destination block; compressed with a float32 scale per token and head."""
        if not self.is_compressed:
            return self.share_layer_bytes
        return 2 * self.share.num_heads * self.destination.block_size * (4 + self.destination.head_dim)

    def blocks_for(self, num_tokens: int) -> int:
        """Destination blocks that hold these tokens."""
        return -(-num_tokens // self.destination.block_size)
