"""Rank 0 of a tensor parallel engine: its part of the model, and the other ranks beside it."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from torch import Tensor

from engines.attention.backend import AttentionRow
from engines.packed_batch import PackedBatch
from engines.process import EngineConfig
from engines.tensor_parallel.group import RankGroup
from engines.tensor_parallel.ranks import RankProcesses, Shard, split_cpus

if TYPE_CHECKING:
    from kvstore.transport import KVRegion


class ParallelEngine:
    """Made before the model is, since its layers call `add_up`; started once the region is there."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.shard = Shard(0, num_ranks, self._add_up)
        self._group: RankGroup | None = None
        self._processes: RankProcesses | None = None

    def cpus(self, config: EngineConfig) -> tuple[int, ...]:
        """Of rank 0."""
        return split_cpus(config.cpus, self.num_ranks)[0]

    def start(self, config: EngineConfig, region: KVRegion, *, device: str) -> None:
        """Start the other ranks and wait until they have loaded their parts.

        Raises:
            DeviceUnavailable: one could not.
        """
        self._processes = RankProcesses(config, self.num_ranks, region, _end_with_rank)
        self._group = RankGroup(self._processes.meeting_file, 0, self.num_ranks, device=device)
        self._processes.wait_ready()

    def tell(self, batch: PackedBatch, rows: tuple[AttentionRow, ...]) -> None:
        """The step that this rank is about to compute."""
        assert self._processes is not None, "not started"
        self._processes.step(batch, rows)

    @property
    def pids(self) -> list[int]:
        return [] if self._processes is None else self._processes.pids

    def close(self) -> None:
        """The ranks leave; safe to repeat."""
        if self._processes is not None:
            self._processes.close()
        if self._group is not None:
            self._group.close()
        self._processes = self._group = None

    def _add_up(self, part: Tensor) -> Tensor:
        assert self._group is not None, "not started"
        return self._group.sum(part)


def _end_with_rank() -> None:
    """The front sees EOF at once and starts another engine; peers see the connections close."""
    sys.stderr.flush()
    os._exit(1)
