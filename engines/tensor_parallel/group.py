"""The ranks of one worker as a torch.distributed group, and the one thing they do together: sums."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

MEET_S: Final = 120.0  # the slowest rank may still be loading weights


class RankGroup:
    """Owned by the engine thread of each rank."""

    def __init__(self, meeting_file: Path, rank: int, num_ranks: int, *, device: str = "cpu") -> None:
        """Wait for the other ranks. `meeting_file`: a new name that all of them were told.

        Raises:
            torch.distributed.DistError: a rank did not come in time.
        """
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # ranks share a host; nobody else shall reach them
        self.rank = rank
        self.num_ranks = num_ranks
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(  # type: ignore[attr-defined]
                str(meeting_file), num_ranks
            ),
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=MEET_S),
        )
        self._parts = torch.empty(0, device=device)

    def sum(self, part: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each. Blocks until every rank has come.

        Parts are added in fp32 in the order of the ranks: gloo's own sum cuts the tensor into pieces by its size, so a
        row's result would depend on how many other rows there are.
        """
        own = part.float().contiguous()
        shape = (self.num_ranks * own.shape[0], *own.shape[1:])
        if self._parts.shape != shape:
            self._parts = own.new_empty(shape)
        dist.all_gather_single(self._parts, own)
        parts = self._parts.chunk(self.num_ranks)
        total = parts[0].clone()
        for other in parts[1:]:
            total += other
        return total.to(part.dtype)

    def close(self) -> None:
        """Leave; the others' next sum fails."""
        dist.destroy_process_group()
