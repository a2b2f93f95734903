"""Ends engines that leave a FENCE unanswered, so that the blocks they might still write become free.

    D: FENCE every 0.5 s  ... unanswered for `transfer.fence_kill_s` -> overdue in D's beat
    supervisor: SIGKILL of the writer's engine -> D reads EOF of a socket that only the writer held: proven dead

Killed is only what the registry says is an engine of a worker that this supervisor started, on the host of the one
that complains, under the incarnation it complains of. A process id alone would prove nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Collection, Iterable

from kvstore.overdue import OverdueWriter
from kvstore.state.records import WorkerBeat

_log = logging.getLogger(__name__)


def engines_to_end(beats: Collection[WorkerBeat], own_pids: Collection[int]) -> dict[int, OverdueWriter]:
    """Process id of each engine of ours that is overdue somewhere on its host, with one who complains. Pure.

    Args:
        own_pids: of the fronts that this supervisor started.
    """
    fronts = {beat.incarnation: beat for beat in beats if beat.pid in own_pids}
    found: dict[int, OverdueWriter] = {}
    for complainer in beats:
        for writer in complainer.overdue_writers:
            front = fronts.get(writer.peer)
            if front is None or front.host_id != complainer.host_id or writer.pid not in front.engine_pids:
                continue
            found.setdefault(writer.pid, writer)
    return found


class OverdueWriters:
    """Owned by the supervisor's main thread. `is_engine` guards against a number that has a new owner."""

    def __init__(self, *, is_engine: Callable[[int], bool], kill: Callable[[int, int], None] = os.kill) -> None:
        self._is_engine = is_engine
        self._kill = kill
        self._told: set[tuple[str, str]] = set()

    def end(self, beats: Collection[WorkerBeat], own_pids: Iterable[int]) -> list[int]:
        """Kill those that are due; log every other complaint once. Returns the process ids that were killed."""
        killed = []
        ours = engines_to_end(beats, set(own_pids))
        for pid, writer in ours.items():
            if not self._is_engine(pid):
                continue
            with contextlib.suppress(ProcessLookupError):
                self._kill(pid, signal.SIGKILL)
                killed.append(pid)
                _log.warning(
                    "killed engine %d of %s: it left the fence of %s unanswered, %d blocks waited for it",
                    pid, writer.peer, writer.xfer, writer.num_blocks,
                )  # fmt: skip
        self._tell_foreign(beats, ours)
        return killed

    def _tell_foreign(self, beats: Collection[WorkerBeat], ours: Collection[int]) -> None:
        complaints = {
            (beat.node, writer.peer): writer
            for beat in beats
            for writer in beat.overdue_writers
            if writer.pid not in ours
        }
        for (node, peer), writer in complaints.items():
            if (node, peer) not in self._told:
                _log.error(
                    "%s: writer %s leaves the fence of %s unanswered; %d blocks stay quarantined. It is no engine of "
                    "this supervisor: end it on its own host.",
                    node, peer or "(unknown)", writer.xfer, writer.num_blocks,
                )  # fmt: skip
        self._told = set(complaints)
