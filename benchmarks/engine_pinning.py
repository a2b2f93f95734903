"""Gives a running cluster's decode engine its cores for itself: everything else of the cluster goes elsewhere.

Linux only: reads /proc and sets affinities, which threads and children made later inherit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def engine_pids(status: Mapping[str, Any], role: str) -> list[int]:
    """Engine processes of the workers of a role, from `celeriac status --json`."""
    return [int(pid) for worker in status["workers"] if worker["role"] == role for pid in worker["engine_pids"]]


def pin_all_but(status: Mapping[str, Any], spared: Iterable[int], cores: Iterable[int]) -> int:
    """Move every process of a cluster, except `spared`, onto `cores`. Returns how many processes were moved."""
    roots = {_parent(int(worker["pid"])) for worker in status["workers"]} | {int(status["redis"]["pid"])}
    pids = (_with_descendants(roots - {0, 1})) - set(spared)
    allowed = set(cores)
    for pid in pids:
        _pin(pid, allowed)
    return len(pids)


@contextmanager
def pinned_self(cores: Iterable[int]) -> Iterator[None]:
    """This process, and what it starts meanwhile, on `cores`."""
    before = os.sched_getaffinity(0)
    _pin(os.getpid(), set(cores))
    try:
        yield
    finally:
        _pin(os.getpid(), before)


def allowed_cores(pid: int) -> list[int]:
    return sorted(os.sched_getaffinity(pid))


def _pin(pid: int, cores: set[int]) -> None:
    for task in _tasks(pid):
        with contextlib.suppress(ProcessLookupError):  # a thread may end meanwhile
            os.sched_setaffinity(task, cores)


def _tasks(pid: int) -> list[int]:
    try:
        return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return []


def _with_descendants(roots: set[int]) -> set[int]:
    parents = {pid: _parent(pid) for pid in (int(e.name) for e in Path("/proc").iterdir() if e.name.isdigit())}
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _parent(pid: int) -> int:
    """0 for a process that is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rsplit(")", 1)[1].split()[1])  # the name, in parentheses, may hold spaces
