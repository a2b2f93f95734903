"""Copying and hashing KV pages, many in one call; the GIL is released for the time of it.

    cell: one layer of one block, `layer_bytes` bytes        place: position of a block in its transfer
    CellDigests: xxh3_64 of each cell of a transfer, whenever and in whatever order they were hashed

C++ does both in one pass over the bytes, which costs no more than the copy. Where it cannot be compiled, `PythonPages`
does the same with memmove and the xxhash package.
"""

from __future__ import annotations

import ctypes
import logging
from array import array
from collections.abc import Sequence
from ctypes import POINTER, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Final, Protocol

import xxhash

from kvstore.errors import NativeUnavailable
from kvstore.native.build import Sources, load_library

logger = logging.getLogger(__name__)

SOURCES: Final = Sources(
    folder=Path(__file__).parent / "cpp",
    main="pages.cpp",
    flags=("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC"),
)
STREAM_BYTES: Final = 512 << 10  # a copy of so much passes by the caches; a smaller one is read again at once
MIN_NATIVE_CELL_BYTES: Final = 241  # xxh3 hashes shorter inputs in other ways; only tests have such cells

Blocks = Sequence[int]


class Pages(ctypes.Structure):
    """Where blocks are. As in pages.cpp."""

    _fields_ = (("address", c_void_p), ("num_blocks", c_int64), ("num_layers", c_int64), ("layer_bytes", c_int64))
    address: int
    num_blocks: int
    num_layers: int
    layer_bytes: int


class _Cells(ctypes.Structure):
    _fields_ = (("sources", c_void_p), ("digests", c_void_p), ("num_places", c_int64))


class CellDigests:
    """Of one transfer. Owned by the thread that moves it.

    Attributes:
        sources: per cell (place * num_layers + layer) the block that was hashed for it; -1: none so far.
        digests: per cell its xxh3_64.
    """

    def __init__(self, num_places: int, num_layers: int) -> None:
        self.num_layers = num_layers
        self.sources = array("q", [-1]) * (num_places * num_layers)
        self.digests = array("Q", [0]) * (num_places * num_layers)
        self.native = _Cells(self.sources.buffer_info()[0], self.digests.buffer_info()[0], num_places)

    def packed(self, num_places: int) -> memoryview:
        """Digests of the first places, in order."""
        return memoryview(self.digests).cast("B")[: 8 * num_places * self.num_layers]


class PageHashes(Protocol):
    """Both raise ValueError, before a byte is touched: a block, layer or place out of bounds."""

    name: str

    def hash(self, own: Pages, blocks: Blocks, *, first: int, lo: int, hi: int, cells: CellDigests) -> None:
        """Digests of layers [lo, hi) of `blocks`, which are the places from `first` on."""
        ...

    def fill(self, own: Pages, blocks: Blocks, *, cells: CellDigests, start: int, max_bytes: int) -> int:
        """Hash what has no digest of the block that should be at its place, `blocks` in order from place 0.

        Goes on from cell `start` until about `max_bytes` were hashed. Returns the next cell; all are done when that
        is `len(blocks) * num_layers`.
        """
        ...


class PageOps(PageHashes, Protocol):
    """`copy` raises as the others do."""

    def copy(
        self,
        own: Pages,
        peer: Pages,
        sources: Blocks,
        targets: Blocks,
        *,
        first: int,
        lo: int,
        hi: int,
        cells: CellDigests | None,
    ) -> None:
        """Layers [lo, hi) of own blocks to blocks of the peer; with `cells` the digests of places `first` on, too."""
        ...


class NativePages:
    """The C++."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        pages, cells = POINTER(Pages), POINTER(_Cells)
        self._copy, self._hash, self._fill = library.copy_cells, library.hash_cells, library.fill_cells
        run = [c_int64, c_int64, c_int64, c_int64]  # count, first, lo, hi
        self._copy.argtypes = [pages, pages, c_void_p, c_void_p, *run, cells, c_int]
        self._hash.argtypes = [pages, c_void_p, *run, cells]
        self._fill.argtypes = [pages, c_void_p, c_int64, cells, c_int64, c_int64]
        self._copy.restype = self._hash.restype = c_int
        self._fill.restype = c_int64

    def copy(
        self,
        own: Pages,
        peer: Pages,
        sources: Blocks,
        targets: Blocks,
        *,
        first: int,
        lo: int,
        hi: int,
        cells: CellDigests | None,
    ) -> None:
        count, src, dst = len(sources), _int64s(sources), _int64s(targets)
        if count != len(dst):
            raise _out_of_bounds(sources, first, lo, hi)
        is_streaming = count * (hi - lo) * own.layer_bytes >= STREAM_BYTES
        table = None if cells is None else cells.native
        args = (src.buffer_info()[0], dst.buffer_info()[0], count, first, lo, hi, table, is_streaming)
        if self._copy(own, peer, *args):
            raise _out_of_bounds(sources, first, lo, hi)

    def hash(self, own: Pages, blocks: Blocks, *, first: int, lo: int, hi: int, cells: CellDigests) -> None:
        ids = _int64s(blocks)
        if self._hash(own, ids.buffer_info()[0], len(ids), first, lo, hi, cells.native):
            raise _out_of_bounds(blocks, first, lo, hi)

    def fill(self, own: Pages, blocks: Blocks, *, cells: CellDigests, start: int, max_bytes: int) -> int:
        ids = _int64s(blocks)
        found = int(self._fill(own, ids.buffer_info()[0], len(ids), cells.native, start, max_bytes))
        if found < 0:
            raise _out_of_bounds(blocks, 0, 0, own.num_layers)
        return found


class PythonPages:
    """The same without a compiler."""

    name = "python"

    def copy(
        self,
        own: Pages,
        peer: Pages,
        sources: Blocks,
        targets: Blocks,
        *,
        first: int,
        lo: int,
        hi: int,
        cells: CellDigests | None,
    ) -> None:
        check_bounds(own, sources, first, lo, hi, cells)
        check_bounds(peer, targets, first, lo, hi, cells)
        if len(sources) != len(targets) or (own.num_layers, own.layer_bytes) != (peer.num_layers, peer.layer_bytes):
            raise _out_of_bounds(sources, first, lo, hi)
        num_bytes = (hi - lo) * own.layer_bytes
        for source, target in zip(sources, targets, strict=True):
            ctypes.memmove(_address(peer, target, lo), _address(own, source, lo), num_bytes)
        if cells is not None:
            self.hash(own, sources, first=first, lo=lo, hi=hi, cells=cells)

    def hash(self, own: Pages, blocks: Blocks, *, first: int, lo: int, hi: int, cells: CellDigests) -> None:
        check_bounds(own, blocks, first, lo, hi, cells)
        for place, block in enumerate(blocks, first):
            for layer in range(lo, hi):
                cell = place * own.num_layers + layer
                view = (ctypes.c_char * own.layer_bytes).from_address(_address(own, block, layer))
                cells.digests[cell] = xxhash.xxh3_64_intdigest(view)
                cells.sources[cell] = block

    def fill(self, own: Pages, blocks: Blocks, *, cells: CellDigests, start: int, max_bytes: int) -> int:
        check_bounds(own, blocks, 0, 0, own.num_layers, cells)
        for cell in range(start, len(blocks) * own.num_layers):
            place, layer = divmod(cell, own.num_layers)
            if cells.sources[cell] == blocks[place]:
                continue
            if max_bytes <= 0:
                return cell
            self.hash(own, blocks[place : place + 1], first=place, lo=layer, hi=layer + 1, cells=cells)
            max_bytes -= own.layer_bytes
        return len(blocks) * own.num_layers


def page_ops(layer_bytes: int) -> PageOps:
    """The fastest for cells of this size. Compiles at first use on a machine: some seconds."""
    if layer_bytes < MIN_NATIVE_CELL_BYTES:
        return PythonPages()
    try:
        return NativePages(load_library(SOURCES))
    except NativeUnavailable as error:
        logger.warning("%s KV pages are copied and hashed in Python, slower.", error)
        return PythonPages()


def _int64s(ids: Blocks) -> array[int]:
    return ids if isinstance(ids, array) and ids.typecode == "q" else array("q", ids)


def _address(pages: Pages, block: int, layer: int) -> int:
    return pages.address + (block * pages.num_layers + layer) * pages.layer_bytes


def check_bounds(pages: Pages, blocks: Blocks, first: int, lo: int, hi: int, cells: CellDigests | None) -> None:
    """Raises ValueError: a block is not of `pages`, or a place not of `cells`, or these are no layers."""
    is_sound = all(0 <= block < pages.num_blocks for block in blocks) and 0 <= lo < hi <= pages.num_layers
    last_cell = (first + len(blocks)) * pages.num_layers
    if not is_sound or (cells is not None and not 0 <= first * pages.num_layers <= last_cell <= len(cells.sources)):
        raise _out_of_bounds(blocks, first, lo, hi)


def _out_of_bounds(blocks: Blocks, first: int, lo: int, hi: int) -> ValueError:
    shown = list(blocks[:8])
    return ValueError(f"blocks {shown} at places {first} on, layers {lo}..{hi}: out of bounds; nothing was moved")
