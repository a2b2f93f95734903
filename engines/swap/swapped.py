"""Requests whose KV lies in host memory: which pages, which blocks it needs to come back. Pure; moves no byte.

    take(choices)   blocks -> pages: frees the blocks, says what to copy before anybody writes into them
    bring_back()    pages -> blocks: the same tables again, shared blocks shared again

A page holds one block. Choices of a request share the blocks of their prompt; each of those needs one page.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Protocol

from engines.sequence import Sequence


class SharedPool(Protocol):
    """Ids with reference counts: the KV blocks of the region, or the pages of the host store."""

    @property
    def num_free(self) -> int: ...
    @property
    def num_used(self) -> int: ...
    def allocate(self, num_blocks: int, /) -> list[int]: ...
    def share(self, block_ids: list[int], /) -> None: ...
    def free(self, block_ids: list[int], /) -> None: ...


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """KV of request `rid` to copy: (block of the region, page of the host store) each."""

    rid: str
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Parked:
    """`num_reserved` blocks of its table held no KV yet; it gets as many again."""

    sequence: Sequence
    pages: list[int]
    num_reserved: int


@dataclass(frozen=True, slots=True)
class Swapped:
    """A request that lies in host memory: `num_blocks` to be as it was, `num_next_blocks` more for its next tokens."""

    rid: str
    num_seqs: int
    num_blocks: int
    num_next_blocks: int


class SwappedRequests:
    """Owned by the engine thread.

    Args:
        pool: blocks of the region.
        block_size: tokens per block.
        pages: of the host store; None where there is none.
    """

    def __init__(self, pool: SharedPool, block_size: int, pages: SharedPool | None = None) -> None:
        self._pool = pool
        self._block_size = block_size
        self._pages = pages
        self._requests: dict[str, list[_Parked]] = {}

    def __len__(self) -> int:
        """Sequences."""
        return sum(map(len, self._requests.values()))

    @property
    def num_free_pages(self) -> int:
        return 0 if self._pages is None else self._pages.num_free

    @property
    def num_used_pages(self) -> int:
        return 0 if self._pages is None else self._pages.num_used

    @property
    def num_blocks(self) -> int:
        """Blocks that all of them need to come back."""
        return sum(map(_num_blocks, self._requests.values()))

    def num_pages_for(self, choices: Items[Sequence]) -> int:
        return len(self._kv_blocks(choices)) if self._pages is not None else 1

    # ---------------------------------------------------------------- out
    def take(self, choices: Items[Sequence]) -> BlockCopy:
        """Give up the blocks of `choices`, all of one request. Their pages hold nothing until the copy is made.

        Raises:
            OutOfBlocks: fewer pages are free than `num_pages_for` says. Nothing has changed.
        """
        assert self._pages is not None, "there is no host store"
        blocks = self._kv_blocks(choices)
        page_of = dict(zip(blocks, self._pages.allocate(len(blocks)), strict=True))
        parked = self._requests.setdefault(choices[0].rid, [])
        is_first: set[int] = set()
        for sequence in choices:
            num_kv = self._num_kv_blocks(sequence)
            pages = [page_of[block] for block in sequence.block_table[:num_kv]]
            self._pages.share([page for page in pages if page in is_first])
            is_first.update(pages)
            parked.append(_Parked(sequence, pages, len(sequence.block_table) - num_kv))
        for sequence in choices:
            table, sequence.block_table = sequence.block_table, []
            self._pool.free(table)
        return BlockCopy(choices[0].rid, tuple(page_of.items()))

    # ---------------------------------------------------------------- back
    def oldest(self) -> Swapped | None:
        """The request that comes back first."""
        if not self._requests:
            return None
        rid = min(self._requests, key=lambda rid: min(p.sequence.arrival_s for p in self._requests[rid]))
        parked = self._requests[rid]
        num_next = 0
        for one in parked:
            num_needed = -(-one.sequence.num_tokens // self._block_size)
            num_next += max(0, num_needed - len(one.pages) - one.num_reserved)
        return Swapped(rid, len(parked), _num_blocks(parked), num_next)

    def bring_back(self, rid: str) -> tuple[list[Sequence], BlockCopy]:
        """Blocks for all choices of a request; its pages are free as soon as the copy is made.

        Raises:
            OutOfBlocks: fewer blocks are free than it needs. Nothing has changed.
        """
        assert self._pages is not None
        parked = self._requests[rid]
        blocks = self._pool.allocate(_num_blocks(parked))
        del self._requests[rid]
        block_of: dict[int, int] = {}
        for one in parked:
            self._pool.share([block_of[page] for page in one.pages if page in block_of])
            for page in one.pages:
                if page not in block_of:
                    block_of[page] = blocks.pop()
            table = [block_of[page] for page in one.pages]
            one.sequence.block_table = table + [blocks.pop() for _ in range(one.num_reserved)]
            self._pages.free(one.pages)
        return [one.sequence for one in parked], BlockCopy(rid, tuple((b, p) for p, b in block_of.items()))

    def remove(self, seq_id: tuple[str, int]) -> None:
        """Forget a sequence and free its pages; safe to repeat."""
        for one in [one for one in self._requests.get(seq_id[0], []) if one.sequence.seq_id == seq_id]:
            assert self._pages is not None
            self._pages.free(one.pages)
            self._requests[seq_id[0]].remove(one)
            if not self._requests[seq_id[0]]:
                del self._requests[seq_id[0]]

    # ---------------------------------------------------------------- private
    def _num_kv_blocks(self, sequence: Sequence) -> int:
        return -(-sequence.num_computed_tokens // self._block_size)

    def _kv_blocks(self, choices: Items[Sequence]) -> list[int]:
        """Blocks with KV, each once, in the order of the tables."""
        tables = (sequence.block_table[: self._num_kv_blocks(sequence)] for sequence in choices)
        return list(dict.fromkeys(block for table in tables for block in table))


def _num_blocks(parked: list[_Parked]) -> int:
    return len({page for one in parked for page in one.pages}) + sum(one.num_reserved for one in parked)
