"""Rank 0's hold on the other ranks: starts them, tells them each step, and dies with any of them."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from engines.attention.backend import AttentionRow
from engines.errors import DeviceUnavailable
from engines.packed_batch import PackedBatch
from engines.process import EngineConfig
from engines.tensor_parallel.step_message import RankStart, RankStep, frame

if TYPE_CHECKING:
    from torch import Tensor

    from kvstore.transport import KVRegion

logger = logging.getLogger(__name__)

SEND_BUFFER_BYTES: Final = 4 << 20


@dataclass(frozen=True)
class Shard:
    """Which part of a model a process holds, and how parts become sums."""

    rank: int
    num_ranks: int
    add_up: Callable[[Tensor], Tensor]


def split_cpus(cpus: tuple[int, ...], num_ranks: int) -> list[tuple[int, ...]]:
    """Cores of each rank: equal shares; with fewer cores than ranks they share.

    >>> split_cpus((0, 1, 2, 3), 2)
    [(0, 1), (2, 3)]
    >>> split_cpus((5,), 2)
    [(5,), (5,)]
    >>> split_cpus((), 2)
    [(), ()]
    """
    share = len(cpus) // num_ranks
    if not share:
        return [cpus[rank % len(cpus) : rank % len(cpus) + 1] if cpus else () for rank in range(num_ranks)]
    return [cpus[rank * share : (rank + 1) * share] for rank in range(num_ranks)]


class RankProcesses:
    """Ranks 1 .. N-1. Owned by the engine thread; one thread more waits for the death of any of them.

    Args:
        on_death: called from that thread, once; it must end this process.
    """

    def __init__(self, config: EngineConfig, num_ranks: int, region: KVRegion, on_death: Callable[[], None]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="celeriac-ranks-")
        self.meeting_file = Path(self._folder.name) / "meeting"
        self._is_closing = False
        self._on_death = on_death
        self._socks: list[socket.socket] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        shares = split_cpus(config.cpus, num_ranks)
        for rank in range(1, num_ranks):
            self._start(
                RankStart(
                    config=config,
                    rank=rank,
                    num_ranks=num_ranks,
                    meeting_file=str(self.meeting_file),
                    num_blocks=region.num_blocks,
                    num_layers=region.num_layers,
                    layer_bytes=region.layer_bytes,
                    cpus=shares[rank],
                ),
                region.fd,
            )

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def wait_ready(self) -> None:
        """Block until all have loaded their slice.

        Raises:
            DeviceUnavailable: one has ended instead; its reason is in the log.
        """
        for rank, sock in enumerate(self._socks, 1):
            if sock.recv(1) != b"R":
                raise DeviceUnavailable(
                    asked=f"rank {rank} of {len(self._socks) + 1}",
                    why="its process ended while it loaded",
                    hint="Its reason is in the log above.",
                )
            threading.Thread(target=self._watch, args=(rank, sock), name=f"rank-{rank}", daemon=True).start()

    def step(self, batch: PackedBatch, rows: tuple[AttentionRow, ...]) -> None:
        """Tell all ranks the step that this one is about to compute."""
        data = frame(RankStep.of(batch, rows))
        for sock in self._socks:
            sock.sendall(data)

    def close(self) -> None:
        """EOF: the ranks leave."""
        self._is_closing = True
        for sock in self._socks:
            sock.close()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        self._folder.cleanup()

    def _start(self, start: RankStart, region_fd: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        env = dict(os.environ)
        if start.cpus:
            env["OMP_NUM_THREADS"] = str(len(start.cpus))
        if len(start.cpus) < 2:
            env.pop("GOMP_SPINCOUNT", None)
        process = subprocess.Popen(
            [sys.executable, "-m", "engines.tensor_parallel.rank_main", str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=env,
        )
        theirs.close()
        data = frame(start)
        socket.send_fds(ours, [data[:4]], [region_fd])
        ours.sendall(data[4:])
        self._socks.append(ours)
        self._processes.append(process)

    def _watch(self, rank: int, sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.recv(1)  # a rank says nothing after `R`: this returns at its end
        if not self._is_closing:
            logger.error("rank %d has died: this engine ends with it", rank)
            self._on_death()
