"""Two prefill workers behind HTTP: the next turn and a recovery start from KV that was written back."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

from tests.cluster import Cluster, read_streams, running_cluster, wait_until

PROMPT = random.Random(3).choices(range(3, 500), k=400)
NUM_TOKENS = 200
FLAGS = ("--dtype", "float32", "--prefill", "2", "--decode", "2")


def events(cluster: Cluster, name: str) -> float:
    """A counter of the workers, summed."""
    lines = cluster.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if f'event="{name}"' in line)


def is_busy(cluster: Cluster, node: str) -> bool:
    start = f'celeriac_live_sequences{{node="{node}"'
    line = next(line for line in cluster.get("/metrics").text.splitlines() if line.startswith(start))
    return float(line.rsplit(" ", 1)[1]) > 0


def test_a_conversation_and_a_recovery_use_what_was_written_back(tmp_path: Path) -> None:
    with running_cluster(tmp_path, *FLAGS) as cluster:
        answer = cluster.complete_ids(PROMPT, NUM_TOKENS, ignore_eos=True)
        turn = [*PROMPT, *answer, *PROMPT[:30]]
        wait_until(lambda: events(cluster, "prefix_kept_blocks") >= 6, timeout_s=30, what="write-back")
        hits = events(cluster, "prefix_hit_tokens")
        second = [cluster.complete_ids(turn, 30, ignore_eos=True) for _ in range(4)]
        assert all(ids == second[0] for ids in second)
        wait_until(
            lambda: events(cluster, "prefix_hit_tokens") - hits >= 4 * 18 * 32,
            timeout_s=30,
            what="all full blocks of prompt and answer found, by whichever prefill worker took the turn",
        )

        # The same answer again, in a stream whose decode worker dies after its first checkpoint.
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS + 1300, "ignore_eos": True, "temperature": 0}
        (undisturbed,) = asyncio.run(read_streams(cluster.url, [body]))

        decoders = {w["node"]: w["engine_pids"][0] for w in cluster.status()["workers"] if w["role"] == "decode"}

        def kill() -> None:
            busy: list[str] = []
            wait_until(
                lambda: busy.extend(node for node in decoders if is_busy(cluster, node)) or busy,  # type: ignore[func-returns-value]
                timeout_s=30,
                what="the beat that shows who decodes",
            )
            os.kill(decoders[busy[0]], signal.SIGKILL)

        (disturbed,) = asyncio.run(read_streams(cluster.url, [body], meanwhile=kill, after_tokens=300))
        assert disturbed.token_ids == undisturbed.token_ids
        assert disturbed.errors == []
        assert disturbed.num_done == 1
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="all blocks free or cached")
