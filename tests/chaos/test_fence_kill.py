"""A prefill engine stands still in the middle of its pushes: it is killed after `fence_kill_s`, and all goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import Cluster, read_streams, running_cluster, wait_until

pytestmark = pytest.mark.chaos

NUM_STREAMS = 24
MAX_TRIES = 6


def _bodies() -> list[dict[str, Any]]:
    filler = " ".join(f"Item {i} is in box {i * 7 % 90}." for i in range(60))
    return [
        {
            "prompt": f"<|im_start|>user\n{i}: {filler} Count to 40.<|im_end|>\n<|im_start|>assistant\n",
            "max_tokens": 40,
            "ignore_eos": True,
            "temperature": 0,
        }
        for i in range(NUM_STREAMS)
    ]


class _Stopper:
    """Stops the prefill engine when grants are open, and notes when its process was gone."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.pid = cluster.worker("prefill")["engine_pids"][0]
        self.was_quarantined = False
        self.killed_after_s = 0.0

    def __call__(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        stopped_s = time.monotonic()
        while time.monotonic() < stopped_s + 15 and Path(f"/proc/{self.pid}/status").exists():
            self.was_quarantined |= self._cluster.blocks_in_use().get("quarantined", 0) > 0
            if time.monotonic() > stopped_s + 4 and not self.was_quarantined:
                os.kill(self.pid, signal.SIGCONT)  # nothing was granted at that moment
                return
            time.sleep(0.1)
        self.killed_after_s = time.monotonic() - stopped_s


def test_a_stopped_prefill_engine_is_killed_and_its_blocks_come_back(tmp_path: Path) -> None:
    flags = ["--dtype", "float32", "--prefill", "1", "--decode", "1", "--set", "transfer.fence_kill_s=1"]
    with running_cluster(tmp_path, *flags) as cluster:
        undisturbed = asyncio.run(read_streams(cluster.url, _bodies()))
        for attempt in range(MAX_TRIES):
            stopper = _Stopper(cluster)
            disturbed = asyncio.run(
                read_streams(cluster.url, _bodies(), meanwhile=stopper, after_s=0.1 * (attempt + 1))
            )
            assert [stream.token_ids for stream in disturbed] == [stream.token_ids for stream in undisturbed]
            assert all(stream.num_done == 1 and not stream.errors for stream in disturbed)
            if stopper.was_quarantined:
                break

        assert stopper.was_quarantined, "no attempt stopped the engine while a grant was open"
        assert 0 < stopper.killed_after_s < 10
        assert f"killed engine {stopper.pid} " in cluster.logs()
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")
