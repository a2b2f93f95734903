"""Pools far smaller than the load: sequences are preempted and recomputed, and every token stays the same."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.live_streams import assert_same
from tests.cluster import read_streams, running_cluster, wait_until

pytestmark = pytest.mark.chaos

CONTEXT = 1024
POOL = {"CELERIAC_KV__MEMORY_BYTES": "3MiB"}  # 32 blocks of 32 tokens: one context, not a block more
MAX_TOKENS = 160


def _prompt(i: int, num_tokens: int) -> list[int]:
    rng = random.Random(i)
    return [rng.randrange(300, 2000) for _ in range(num_tokens)]


def _bodies() -> list[dict[str, Any]]:
    """Six sequences of five to ten blocks each."""
    common = {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    how = [{"temperature": 0}, {"temperature": 0.9, "seed": 5}]
    return [{"prompt": _prompt(i, (20, 150)[i % 2]), **how[i // 2 % 2], **common} for i in range(6)]


def test_more_sequences_and_choices_than_fit_all_end_exact(tmp_path: Path) -> None:
    flags = ("--dtype", "float32", "--set", f"model.max_model_len={CONTEXT}")
    with running_cluster(tmp_path, *flags, env=POOL) as cluster:
        pairs = [asyncio.run(read_streams(cluster.url, _bodies()[i : i + 2])) for i in (0, 2, 4)]
        undisturbed = [stream for pair in pairs for stream in pair]
        assert_same(undisturbed, asyncio.run(read_streams(cluster.url, _bodies())))

        wide = {"prompt": _prompt(0, 20), "max_tokens": 300, "temperature": 0, "ignore_eos": True, "n": 4}
        (stream,) = asyncio.run(read_streams(cluster.url, [wide]))  # 40 blocks, were they all there at once
        assert stream.errors == []
        assert stream.finish_reasons == ["length"] * 4
        assert {tuple(ids) for ids in stream.token_ids} == {tuple(stream.token_ids[0])}
        assert stream.token_ids[0][:MAX_TOKENS] == undisturbed[0].token_ids[0]

        assert len(cluster.complete_ids(_prompt(1, CONTEXT - 1), 1)) == 1
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")
