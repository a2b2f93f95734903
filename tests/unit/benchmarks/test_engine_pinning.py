"""Cores of a running cluster: who is moved, and that we come back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.engine_pinning import allowed_cores, engine_pids, pin_all_but, pinned_self

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import sys; sys.stdin.read()'])"
needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="pinning needs two cores")


def test_engines_are_found_by_role() -> None:
    workers = [{"role": "prefill", "engine_pids": [11]}, {"role": "decode", "engine_pids": [12]}]

    assert engine_pids({"workers": workers}, "decode") == [12]


@needs_two_cores
def test_we_are_pinned_only_meanwhile() -> None:
    before = allowed_cores(os.getpid())

    with pinned_self(before[:1]):
        assert allowed_cores(os.getpid()) == before[:1]

    assert allowed_cores(os.getpid()) == before


@needs_two_cores
def test_a_whole_tree_is_moved_but_for_the_spared_one() -> None:
    cores = allowed_cores(os.getpid())
    supervisor = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE)
    try:
        worker = wait_for_child(supervisor.pid)
        status = {"workers": [{"pid": worker}], "redis": {"pid": 0}}

        assert pin_all_but(status, [supervisor.pid], cores[:1]) == 1
        assert allowed_cores(worker) == cores[:1]
        assert allowed_cores(supervisor.pid) == cores

        pin_all_but(status, [], cores[:1])
        assert allowed_cores(supervisor.pid) == cores[:1]
    finally:
        supervisor.communicate(timeout=10)


def wait_for_child(pid: int) -> int:
    """The first child of a process, as soon as it has one."""
    for _ in range(2_000_000):
        with open(f"/proc/{pid}/task/{pid}/children") as file:  # noqa: PTH123
            children = file.read().split()
        if children:
            return int(children[0])
    raise AssertionError("no child")
