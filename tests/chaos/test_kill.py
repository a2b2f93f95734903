"""kill -9 of each part with 20 live streams: every stream ends properly, with the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.live_streams import all_ready, assert_fault_changes_nothing, bodies
from tests.cluster import Cluster, read_streams, running_cluster, wait_until

pytestmark = pytest.mark.chaos


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _kills(cluster: Cluster, pid_of: Callable[[Cluster], int]) -> Iterator[Callable[[], None]]:
    while True:
        yield partial(_kill, pid_of(cluster))


# Part -> its pid, and when it dies: prompts are computed within the first moments, tokens come later.
EARLY, MIDDLE = {"after_s": 0.05}, {"after_tokens": 25}
VICTIMS: dict[str, tuple[Callable[[Cluster], int], dict[str, Any]]] = {
    "decode front": (lambda cluster: cluster.worker("decode")["pid"], MIDDLE),
    "decode engine": (lambda cluster: cluster.worker("decode")["engine_pids"][0], MIDDLE),
    "prefill front": (lambda cluster: cluster.worker("prefill")["pid"], EARLY),
    "prefill engine": (lambda cluster: cluster.worker("prefill")["engine_pids"][0], EARLY),
    "redis": (lambda cluster: cluster.status()["redis"]["pid"], MIDDLE),
}


@pytest.mark.parametrize("num_decode", [2, 1])
def test_streams_survive_the_death_of_any_part(num_decode: int, tmp_path: Path) -> None:
    victims = VICTIMS if num_decode == 2 else {k: v for k, v in VICTIMS.items() if k != "redis"}
    with running_cluster(tmp_path, "--dtype", "float32", "--prefill", "1", "--decode", str(num_decode)) as cluster:
        undisturbed = asyncio.run(read_streams(cluster.url, bodies()))
        for name, (pid_of, moment) in victims.items():
            print("killing", name)
            assert_fault_changes_nothing(cluster, undisturbed, _kills(cluster, pid_of), **moment)
            wait_until(lambda: all_ready(cluster), timeout_s=60, what=f"all workers ready after {name}")
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")


def test_no_process_outlives_a_killed_supervisor(tmp_path: Path) -> None:
    with running_cluster(tmp_path, "--dtype", "float32") as cluster:
        status = cluster.status()
        pids = [status["redis"]["pid"], status["gateway"][0]["pid"], status["flower"]["pid"]]
        for worker in status["workers"]:
            pids += [worker["pid"], *worker["engine_pids"]]

        _kill(int((tmp_path / "supervisor.pid").read_text()))

        wait_until(lambda: not any(map(_is_alive, pids)), timeout_s=30, what="no orphan left")


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(") ", 1)[1][0] != "Z"
