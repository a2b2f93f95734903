"""Paged attention in C++: reads pages where they are, nothing is gathered, padded or masked.

    rows with one query      splits of 512 tokens in parallel, merged in order    cpp/attention_one.h
    rows with several        tiles of queries in parallel                         cpp/attention_tile.h

Both add in the same order. So a query's result depends on its own tokens alone, bit for bit: not on the batch, the
chunk it comes in or the number of threads, nor on whether it is decoded or computed again in a prompt.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from itertools import chain
from typing import Final

import numpy as np
import torch
from torch import Tensor

from engines.attention.backend import AttentionMetadata
from engines.ext.library import HEAD_DIMS, Kernels

SPLIT_TOKENS: Final = 512  # kSplit
_ROOM: Final = (0,) * 8  # blocks that a table may grow by before the arrays are made again
QUERY_ROWS: Final = 96  # kQueryRows


class _StepArgs(ctypes.Structure):
    """`struct Step` of cpp/paged.h, field by field."""

    _fields_ = (
        ("kv", c_void_p),
        ("num_layers", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("heads_apart", c_int64),
        ("block_size", c_int64),
        ("num_threads", c_int64),
        ("scale", c_float),
        ("num_tokens", c_int64),
        ("slots", c_void_p),
        ("tables", c_void_p),
        ("table_at", c_void_p),
        ("token_at", c_void_p),
        ("starts", c_void_p),
        ("num_new", c_void_p),
        ("num_decode", c_int64),
        ("decode_row", c_void_p),
        ("decode_split", c_void_p),
        ("num_prefill", c_int64),
        ("prefill_row", c_void_p),
        ("prefill_tile", c_void_p),
        ("num_merge", c_int64),
        ("merge_row", c_void_p),
        ("partial_at", c_void_p),
        ("partials", c_void_p),
    )


class NativeAttention:
    """`kv` is the region `[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]`, or some of its heads. One
    thread only.
    """

    def __init__(self, kv: Tensor, num_heads: int, kernels: Kernels) -> None:
        _, num_layers, _, num_kv_heads, block_size, head_dim = kv.shape
        assert kv[0, 0, 0].is_contiguous()
        assert kv.dtype == kernels.dtype
        assert head_dim in HEAD_DIMS, head_dim
        self._kv = kv
        self._kernels = kernels
        self._head_dim = head_dim
        self._tile_tokens = max(1, QUERY_ROWS // (num_heads // num_kv_heads))
        self._args = _StepArgs(
            kv=kv.data_ptr(),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            heads_apart=kv.stride(2) // (block_size * head_dim),
            block_size=block_size,
            scale=head_dim**-0.5,
        )
        self._address = ctypes.addressof(self._args)
        # The arrays that the structure points into, and room for the parts of split rows.
        self._slots = torch.empty(0, dtype=torch.int64)
        self._arrays = np.empty(0, dtype=np.int64)
        self._partials = torch.empty(0)
        # What the arrays were made of, and where in them the starts and the room of each table are.
        self._counts: list[int] = []
        self._block_tables: list[list[int]] = []
        self._starts = self._arrays
        self._table_at: list[int] = []
        self._table_ends: list[int] = []

    @property
    def step_address(self) -> int:
        """Of the `Step` that `begin_step` filled, for kernels that attend themselves."""
        return self._address

    def begin_step(self, metadata: AttentionMetadata) -> None:
        rows = metadata.rows
        starts = np.array([row.start for row in rows], dtype=np.int64)
        counts, block_tables = [row.num_new_tokens for row in rows], [row.block_table for row in rows]
        num_new = np.array(counts, dtype=np.int64)
        self._point_at_slots(metadata.slot_mapping)
        if self._goes_on(starts, counts, block_tables):
            return
        # Behind each table there is room for it to grow.
        lengths = np.array([len(table) + len(_ROOM) for table in block_tables], dtype=np.int64)
        with_room = chain.from_iterable((table, _ROOM) for table in block_tables)
        tables = np.fromiter(chain.from_iterable(with_room), dtype=np.int64, count=int(lengths.sum()))
        table_at = lengths.cumsum() - lengths
        is_decode = num_new == 1
        splits = np.where(is_decode, starts // SPLIT_TOKENS + 1, 0)
        tiles = np.where(is_decode, 0, -(-num_new // self._tile_tokens))
        decode_row, decode_split = _tasks(splits)
        prefill_row, prefill_tile = _tasks(tiles)
        merge_row = (splits > 1).nonzero()[0]
        self._point_at(
            tables=tables,
            table_at=table_at,
            token_at=num_new.cumsum() - num_new,
            starts=starts,
            num_new=num_new,
            decode_row=decode_row,
            decode_split=decode_split,
            prefill_row=prefill_row,
            prefill_tile=prefill_tile,
            merge_row=merge_row,
            partial_at=splits.cumsum() - splits,
        )
        first = len(tables) + 2 * len(rows)
        self._starts = self._arrays[first : first + len(rows)]
        self._counts, self._block_tables = counts, block_tables
        self._table_at, self._table_ends = table_at.tolist(), (table_at + lengths).tolist()
        args = self._args
        args.num_decode, args.num_prefill, args.num_merge = len(decode_row), len(prefill_row), len(merge_row)
        size = len(decode_row) * args.num_heads * (self._head_dim + 2)
        if size > self._partials.numel():
            self._partials = torch.empty(size)
        args.partials = self._partials.data_ptr()

    def _point_at_slots(self, slots: Tensor) -> None:
        self._slots = slots
        args = self._args
        args.num_threads = torch.get_num_threads()
        args.num_tokens, args.slots = len(slots), slots.data_ptr()

    def _goes_on(self, starts: np.ndarray, counts: list[int], block_tables: list[list[int]]) -> bool:
        """Bring the arrays up to date where nothing is new but a token each of the same decoding sequences.

        False: the batch is another one; the arrays are to be made again.
        """
        if counts != self._counts or max(counts, default=0) != 1:
            return False
        if (starts // SPLIT_TOKENS != self._starts // SPLIT_TOKENS).any():
            return False
        for i, (table, before) in enumerate(zip(block_tables, self._block_tables, strict=True)):
            if table is before:  # a table that grows is another list
                continue
            num_before, num_new = len(before), len(table) - len(before)
            room = self._table_ends[i] - self._table_at[i] - num_before
            if not 0 <= num_new <= room or table[:num_before] != before:
                return False
            lo = self._table_at[i] + num_before
            self._arrays[lo : lo + num_new] = table[num_before:]
            self._block_tables[i] = table
        self._starts[:] = starts
        return True

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert k.stride()[1:] == v.stride()[1:] == (self._head_dim, 1), (k.stride(), v.stride())
        self._kernels.write_kv(
            self._address, layer, self._head_dim, k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)
        )

    def forward(self, layer: int, q: Tensor) -> Tensor:
        assert q.stride()[1:] == (self._head_dim, 1), q.stride()
        out = torch.empty(q.shape, dtype=q.dtype)
        self._kernels.attend(self._address, layer, self._head_dim, q.data_ptr(), q.stride(0), out.data_ptr())
        return out

    def _point_at(self, **arrays: np.ndarray) -> None:
        """All in one buffer: asking numpy for an address costs a microsecond."""
        self._arrays = np.concatenate(list(arrays.values()))
        address = self._arrays.ctypes.data
        for name, array in arrays.items():
            setattr(self._args, name, address)
            address += array.nbytes


def _tasks(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, number within the row) of `counts[row]` tasks of each row."""
    rows = np.repeat(np.arange(len(counts)), counts)
    return rows, np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
