"""Copies KV out of source blocks into the layout of a destination. One per link, at the writer.

Reads the writer's region as an array of words; what it makes is in the order in which the share's runs lie in the
destination's pages: layer, keys then values, head, token.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from kvstore.reshard.compress import compress, expand
from kvstore.reshard.dtypes import WORD_TYPES, Words, convert
from kvstore.reshard.layout import KVLayout
from kvstore.reshard.plan import Conversion, HeadShare, token_pieces


def blocks_as_words(buffer: memoryview, layout: KVLayout) -> Words:
    """A region as `[num_blocks, num_layers, 2, num_heads, block_size, head_dim]`, without a copy.

    It keeps the region's mapping alive: let go of it before the region is closed.
    """
    shape = (-1, layout.num_layers, 2, layout.num_heads, layout.block_size, layout.head_dim)
    return np.frombuffer(buffer, dtype=WORD_TYPES[layout.dtype]).reshape(shape)


def share_of_block(blocks: Words, block: int, share: HeadShare, layer_lo: int, layer_hi: int) -> Words:
    """The share's part of a destination block, `[layers, 2, heads, block_size, head_dim]`, in place."""
    found: Words = blocks[block, layer_lo:layer_hi, :, share.dst_lo : share.dst_lo + share.num_heads]
    return found


class Packer:
    """Not thread-safe."""

    def __init__(self, conversion: Conversion, region: memoryview) -> None:
        self.conversion = conversion
        self._source = blocks_as_words(region, conversion.source)
        self._word_type = WORD_TYPES[conversion.destination.dtype]

    def shape(self, num_layers: int) -> tuple[int, ...]:
        """Of the share of one destination block, in words."""
        c = self.conversion
        return (num_layers, 2, c.share.num_heads, c.destination.block_size, c.destination.head_dim)

    def fill(
        self, out: Words, table: Mapping[int, int], place: int, num_tokens: int, layer_lo: int, layer_hi: int
    ) -> None:
        """Layers [lo, hi) of the destination block at `place`.

        Args:
            out: of `shape`, any strides; every word is written.
            table: source block by its position in the sequence; all that hold tokens of this block.
            num_tokens: behind them the block is zeroed.
        """
        c = self.conversion
        heads = slice(c.share.src_lo, c.share.src_lo + c.share.num_heads)
        end = 0
        for piece in token_pieces(c.source.block_size, c.destination.block_size, place, num_tokens):
            tokens = slice(piece.src_token, piece.src_token + piece.num_tokens)
            words = self._source[table[piece.src_index], layer_lo:layer_hi, :, heads, tokens]
            end = piece.dst_token + piece.num_tokens
            out[:, :, :, piece.dst_token : end] = convert(words, c.source.dtype, c.destination.dtype)
        if end < c.destination.block_size:
            out[:, :, :, end:] = 0

    def pack(
        self,
        out: NDArray[np.uint8],
        table: Mapping[int, int],
        place: int,
        num_tokens: int,
        layer_lo: int,
        layer_hi: int,
    ) -> Words:
        """The same as it goes over the wire: `(hi - lo) * conversion.wire_layer_bytes` bytes of `out`.

        Returns what will lie in the receiver's pages: contiguous, of `shape`.
        """
        c, shape = self.conversion, self.shape(layer_hi - layer_lo)
        if not c.is_compressed:
            words: Words = out.view(self._word_type).reshape(shape)
            self.fill(words, table, place, num_tokens, layer_lo, layer_hi)
            return words
        words = np.empty(shape, dtype=self._word_type)
        self.fill(words, table, place, num_tokens, layer_lo, layer_hi)
        compress(words, c.destination.dtype, c.compression, out)
        return expand(out, shape, c.destination.dtype, c.compression)


class Unpacker:
    """Expands compressed shares into the pages of the destination. One per link, at the receiver."""

    def __init__(self, conversion: Conversion, region: memoryview) -> None:
        self._conversion = conversion
        self._pages = blocks_as_words(region, conversion.destination)

    def expand(self, packed: memoryview, block: int, layer_lo: int, layer_hi: int) -> None:
        """`(hi - lo) * conversion.wire_layer_bytes` bytes into layers [lo, hi) of a block."""
        c = self._conversion
        out = share_of_block(self._pages, block, c.share, layer_lo, layer_hi)
        out[:] = expand(np.frombuffer(packed, dtype=np.uint8), out.shape, c.destination.dtype, c.compression)
