"""Parts that stop for a while and wake up again, lost connections, a wiped state, workers that end in good order: every
stream stays as it was."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.chaos.live_streams import assert_fault_changes_nothing, bodies
from tests.cluster import Cluster, read_streams, running_cluster, wait_until

pytestmark = pytest.mark.chaos

EARLY, MIDDLE = {"after_s": 0.05}, {"after_tokens": 25}
MAX_LINES = 12  # of one log, about one outage


def _pause(pid: int, seconds: float) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        os.kill(pid, signal.SIGCONT)


def _command(url: str, *words: str) -> None:
    with redis.Redis.from_url(url) as client:
        client.execute_command(*words)  # type: ignore[no-untyped-call]


def _faults(cluster: Cluster) -> dict[str, tuple[dict[str, Any], Callable[[], None]]]:
    """Name -> when it comes after the requests, and what it does. Leases are 2 s: 4 s is a death that was none."""
    status = cluster.status()
    prefill, decode = cluster.worker("prefill"), cluster.worker("decode")
    url, server_pid = status["redis"]["url"], status["redis"]["pid"]
    return {
        "decode front paused": (MIDDLE, partial(_pause, decode["pid"], 4.0)),
        "decode engine paused": (MIDDLE, partial(_pause, decode["engine_pids"][0], 4.0)),
        "prefill front paused": (EARLY, partial(_pause, prefill["pid"], 4.0)),
        "state server paused": (MIDDLE, partial(_pause, server_pid, 4.0)),
        "connections killed": (MIDDLE, partial(_command, url, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")),
        "state wiped": (MIDDLE, partial(_command, url, "FLUSHALL")),
        "prefill worker asked to end": (EARLY, partial(os.kill, prefill["pid"], signal.SIGTERM)),
        "decode worker asked to end": (MIDDLE, partial(os.kill, decode["pid"], signal.SIGTERM)),
    }


def _tries(cluster: Cluster, name: str, fault: Callable[[], None]) -> Iterator[Callable[[], None]]:
    yield fault
    while True:
        yield _faults(cluster)[name][1]  # processes may be others by then


def test_streams_survive_pauses_lost_connections_a_wiped_state_and_orderly_ends(tmp_path: Path) -> None:
    with running_cluster(tmp_path, "--dtype", "float32", "--prefill", "1", "--decode", "2") as cluster:
        undisturbed = asyncio.run(read_streams(cluster.url, bodies()))
        for name, (moment, fault) in _faults(cluster).items():
            print("fault:", name)
            assert_fault_changes_nothing(cluster, undisturbed, _tries(cluster, name, fault), **moment)
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")
        _assert_calm_logs(tmp_path / "logs")


def _assert_calm_logs(folder: Path) -> None:
    """No traceback, no flood, no word of a prompt."""
    for path in folder.glob("*.log"):
        text = path.read_text(errors="replace")
        assert "Traceback" not in text, f"{path.name}: {text[text.index('Traceback') :][:2000]}"
        outage_lines = [line for line in text.splitlines() if "no answer" in line or "not renewed" in line]
        assert len(outage_lines) <= MAX_LINES, f"{path.name}: {outage_lines}"
        assert "Count from 7 to 90" not in text
