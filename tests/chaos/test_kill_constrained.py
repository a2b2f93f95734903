"""kill -9 of an engine in the midst of structured outputs: grammars are rebuilt from ids, every text still matches."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import read_streams, running_cluster, wait_until

pytestmark = pytest.mark.chaos

PATTERN = "([a-z]{2,7} ){28}end"
NUM_STREAMS = 10


def _bodies() -> list[dict[str, Any]]:
    common = {"max_tokens": 220, "structured_outputs": {"regex": PATTERN}, "n": 2, "temperature": 1.0}
    return [{"prompt": f"Tell story number {i}.", "seed": 70 + i, **common} for i in range(NUM_STREAMS)]


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_recovered_output_goes_on_in_its_grammar(role: str, tmp_path: Path) -> None:
    with running_cluster(tmp_path, "--dtype", "float32") as cluster:
        undisturbed = asyncio.run(read_streams(cluster.url, _bodies()))
        killed_s: list[float] = []
        pid = cluster.worker(role)["engine_pids"][0]

        def kill() -> None:
            os.kill(pid, signal.SIGKILL)
            killed_s.append(time.monotonic())

        moment: dict[str, Any] = {"after_tokens": 10} if role == "decode" else {"after_s": 0.05}
        disturbed = asyncio.run(read_streams(cluster.url, _bodies(), meanwhile=kill, **moment))

        assert max(stream.stamps_s[-1] for stream in disturbed) > killed_s[0], "all streams ended before the kill"
        for before, after in zip(undisturbed, disturbed, strict=True):
            assert after.errors == []
            assert after.token_ids == before.token_ids
            assert all(re.fullmatch(PATTERN, text) for text in after.texts)
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")
