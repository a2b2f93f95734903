"""Decode workers with few blocks and many long requests: host memory, the other worker, the queue; every token stays
the same, also when the worker that takes a sequence is killed in mid-move."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.live_streams import assert_same
from tests.cluster import Cluster, read_streams, running_cluster, wait_until

pytestmark = pytest.mark.chaos

CONTEXT = 1024
POOL = {"CELERIAC_KV__MEMORY_BYTES": "3MiB"}  # 32 blocks of 32 tokens
MAX_TOKENS = 220
NUM_REQUESTS = 10  # of eight to eleven blocks each: 60 are more than two workers have


def _bodies() -> list[dict[str, Any]]:
    how = [{"temperature": 0}, {"temperature": 0.9, "seed": 5}]
    bodies = []
    for i in range(NUM_REQUESTS):
        rng = random.Random(i)
        prompt = [rng.randrange(300, 2000) for _ in range((20, 110)[i % 2])]
        bodies.append({"prompt": prompt, "max_tokens": MAX_TOKENS, "ignore_eos": True, **how[i // 2 % 2]})
    return bodies


def _events(cluster: Cluster) -> dict[str, float]:
    """`celeriac_worker_events_total` of preemption, summed over the workers."""
    totals: dict[str, float] = {}
    for line in cluster.get("/metrics").text.splitlines():
        if line.startswith("celeriac_worker_events_total{") and 'event="preempt_' in line:
            name = line.split('event="preempt_')[1].split('"')[0]
            totals[name] = totals.get(name, 0) + float(line.rsplit(" ", 1)[1])
    return totals


def _running(tmp_path: Path, *flags: str) -> Any:
    base = ("--dtype", "float32", "--prefill", "1", "--decode", "2", "--set", f"model.max_model_len={CONTEXT}")
    return running_cluster(tmp_path, *base, *flags, env=POOL)


@pytest.mark.parametrize(("swap_bytes", "expected"), [("64MiB", "swapped_out"), ("0B", "moved")])
def test_more_long_requests_than_two_workers_hold_all_end_exact(tmp_path: Path, swap_bytes: str, expected: str) -> None:
    with _running(tmp_path, "--set", f"kv.swap_bytes={swap_bytes}") as cluster:
        bodies = _bodies()
        undisturbed = [asyncio.run(read_streams(cluster.url, [body]))[0] for body in bodies]
        assert sum(_events(cluster).get(name, 0) for name in ("swapped_out", "moved", "released")) == 0

        assert_same(undisturbed, asyncio.run(read_streams(cluster.url, bodies)))

        wait_until(lambda: _events(cluster).get(expected, 0) >= 1, timeout_s=30, what=f"{expected} in /metrics")
        print(_events(cluster))
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")


def test_the_death_of_a_decode_worker_among_moves_changes_no_token(tmp_path: Path) -> None:
    with _running(tmp_path, "--set", "kv.swap_bytes=0B") as cluster:
        bodies = _bodies()
        undisturbed = [asyncio.run(read_streams(cluster.url, [body]))[0] for body in bodies]
        pids = [worker["engine_pids"][0] for worker in cluster.status()["workers"] if worker["role"] == "decode"]

        def kill_in_mid_move() -> None:
            wait_until(
                lambda: sum(_events(cluster).get(name, 0) for name in ("moved", "released")) >= 1,
                timeout_s=60,
                what="a first move",
            )
            os.kill(pids[1], signal.SIGKILL)

        assert_same(undisturbed, asyncio.run(read_streams(cluster.url, bodies, meanwhile=kill_in_mid_move)))
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")
