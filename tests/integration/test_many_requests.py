"""256 requests at once on one prefill and one decode worker."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import httpx2 as httpx

from tests.cluster import ROOT, Cluster, read_streams, running_cluster, wait_until

NUM_REQUESTS = 256


def _inspect_active(cluster: Cluster, nodes: list[str], seen: list[int]) -> None:
    """How many tasks each of these workers has live, through Celery's own command."""
    env = {**cluster.env, "CELERIAC_CONFIG": str(cluster.run_dir / "cluster.yaml")}
    celery = [sys.executable, "-m", "celery", "-A", "tasks"]
    command = [*celery, "inspect", "active", "--json", "--timeout", "30", "--destination", ",".join(nodes)]
    reply = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert reply.returncode == 0, reply.stderr
    seen += [len(tasks) for tasks in json.loads(reply.stdout[reply.stdout.index("{") :]).values()]


def test_256_requests_at_once_all_finish_whole_and_in_order(tmp_path: Path) -> None:
    seen: list[int] = []
    bodies = [
        {
            "prompt": f"<|im_start|>user\nCount from {i % 80} to 90.<|im_end|>\n<|im_start|>assistant\n",
            "max_tokens": 48,
            "temperature": 0,
            "ignore_eos": True,
        }
        for i in range(NUM_REQUESTS)
    ]
    with running_cluster(tmp_path, "--dtype", "float32") as cluster:
        nodes = [worker["node"] for worker in cluster.status()["workers"]]
        inspect = partial(_inspect_active, cluster, nodes, seen)
        streams = asyncio.run(read_streams(cluster.url, bodies, meanwhile=inspect))

        assert [len(s.token_ids[0]) for s in streams] == [48] * NUM_REQUESTS
        assert all(s.num_done == 1 and s.finish_reasons == ["length"] and not s.errors for s in streams)
        by_prompt = {b["prompt"]: s.token_ids for b, s in zip(bodies, streams, strict=True)}
        assert all(by_prompt[b["prompt"]] == s.token_ids for b, s in zip(bodies, streams, strict=True))
        assert max(seen) > 1, f"inspect active saw {seen}"
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")
        flower = cluster.status()["flower"]["url"]
        wait_until(lambda: _both_kinds_succeeded(flower), timeout_s=30, what="Flower shows both kinds as SUCCESS")


def _both_kinds_succeeded(flower_url: str) -> bool:
    tasks = httpx.get(f"{flower_url}/api/tasks?limit=2000", timeout=30, trust_env=False).json().values()
    done = [task for task in tasks if task["state"] == "SUCCESS" and (task["runtime"] or 0) > 0]
    kinds = {task["name"]: 0 for task in done}
    for task in done:
        kinds[task["name"]] += 1
    return kinds.get("celeriac.prefill", 0) >= NUM_REQUESTS and kinds.get("celeriac.decode", 0) >= NUM_REQUESTS
