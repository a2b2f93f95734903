"""Decode steps by graphs, one per bucket of rows and pages, recorded when a bucket is first met.

    the bucket's graph is there       replay
    not yet, and there is room        record on padding rows, replay the step, and compare with the eager pass:
                                      unlike -> graphs are off for good, and the eager result counts
    else                              eager, by whoever calls

Recording on padding rows and comparing on a real step shows that a graph reads its step from the inputs: a number that
was baked in at the recording would give the padding's result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from engines.attention.backend import AttentionRow
from engines.attention.padded_decode import GraphAttention
from engines.graphs.buckets import bucket_of
from engines.graphs.capture import Graph, GraphMaker
from engines.graphs.decode_inputs import DecodeInputs
from engines.packed_batch import PackedBatch
from engines.self_check import TOLERANCES, relative_error
from engines.staging import Staging

logger = logging.getLogger(__name__)

MAX_GRAPHS: Final = 64  # each holds some MB of driver memory, and recording one takes a good part of a second

Forward = Callable[[Tensor, Tensor, GraphAttention], Tensor]


@dataclass(slots=True)
class _Bucket:
    inputs: DecodeInputs
    attention: GraphAttention
    graph: Graph
    is_proven: bool = False


class DecodeGraphs:
    """Owned by the engine thread.

    Args:
        kv: the region, or the heads of it that the model has; `scratch_block` is one of its blocks that no pool hands
            out. It is zeroed here and stays so.
        forward: hidden states `[num_rows, hidden]` of ids, positions and an attention that has begun its step.
        make_attention: an attention over the region, for given inputs.
    """

    def __init__(
        self,
        kv: Tensor,
        *,
        scratch_block: int,
        forward: Forward,
        make_attention: Callable[[DecodeInputs], GraphAttention],
        maker: GraphMaker,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        kv[scratch_block] = 0
        self._kv = kv
        self._dtype, self._device, self._block_size = kv.dtype, kv.device, kv.shape[4]
        self._scratch_block = scratch_block
        self._forward = forward
        self._make_attention = make_attention
        self._maker = maker
        self._max_graphs = max_graphs
        self._staging = Staging(kv.device)
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._loaded: _Bucket | None = None
        self._num_rows = 0
        self.is_on = True

    @property
    def num_graphs(self) -> int:
        return len(self._buckets)

    def load(self, batch: PackedBatch, rows: Sequence[AttentionRow]) -> bool:
        """Take in a step of decode rows. False: it is to be computed eagerly, and nothing was done."""
        if not self.is_on or not rows or any(row.num_new_tokens != 1 for row in rows):
            return False
        key = bucket_of(len(rows), -(-max(row.context_len for row in rows) // self._block_size), self._block_size)
        if key is None:
            return False
        bucket = self._buckets.get(key) or self._record(*key)
        if bucket is None:
            return False
        step = bucket.inputs.load(batch, rows, self._staging)
        bucket.attention.plan(step.contexts, step.tables)
        self._loaded, self._num_rows = bucket, len(rows)
        return True

    def run(self, eager: Callable[[], Tensor]) -> Tensor:
        """Hidden states `[num_rows, hidden]` of the step that was loaded; valid until the next `run`.

        Args:
            eager: computes the same step without a graph. Called for the first step of a bucket only.
        """
        assert self._loaded is not None, "nothing is loaded"
        bucket, self._loaded = self._loaded, None
        hidden = bucket.graph.replay()[: self._num_rows]
        if bucket.is_proven:
            return hidden
        written = self._written_by(bucket)
        expected = eager()
        if not bool(expected.isfinite().all()):
            return expected  # damaged KV, which is no fault of the graph and shows nothing of it
        error = max(relative_error(hidden, expected), relative_error(written, self._written_by(bucket)))
        bucket.is_proven = error < TOLERANCES[self._dtype]
        if bucket.is_proven:
            return hidden
        self._turn_off(
            f"one of {bucket.inputs.num_rows} rows and {bucket.inputs.num_pages} pages is off by {error:.3g} of what "
            f"the eager pass gives, allowed is {TOLERANCES[self._dtype]:g}"
        )
        return expected

    def _written_by(self, bucket: _Bucket) -> Tensor:
        """The KV of the loaded step's tokens, `[num_rows, num_layers, 2, num_kv_heads, head_dim]`, a copy.

        One token among many hardly shows in what attention gives; where the step left it is looked at, too.
        """
        slots = bucket.inputs.slots[: self._num_rows]
        blocks = torch.div(slots, self._block_size, rounding_mode="floor")
        return self._kv[blocks, :, :, :, slots % self._block_size]

    def _record(self, num_rows: int, num_pages: int) -> _Bucket | None:
        """A new bucket; None where there is no room for it or it cannot be recorded."""
        if len(self._buckets) >= self._max_graphs:
            return None
        inputs = DecodeInputs(
            num_rows=num_rows,
            num_pages=num_pages,
            block_size=self._block_size,
            scratch_block=self._scratch_block,
            device=self._device,
        )
        attention = self._make_attention(inputs)
        padding = inputs.load_padding(self._staging)

        def work() -> Tensor:
            attention.begin()
            return self._forward(inputs.ids, inputs.positions, attention)

        try:
            attention.plan(padding.contexts, padding.tables)
            graph = self._maker.capture(work)
        except (RuntimeError, ValueError) as error:  # ValueError: what FlashInfer raises
            self._turn_off(f"one of {num_rows} rows and {num_pages} pages cannot be recorded ({error})")
            return None
        bucket = self._buckets[num_rows, num_pages] = _Bucket(inputs, attention, graph)
        return bucket

    def _turn_off(self, why: str) -> None:
        logger.warning("decode graphs are off: %s. Decode steps are computed eagerly, slower and as exact.", why)
        self.is_on = False
        self._buckets.clear()
