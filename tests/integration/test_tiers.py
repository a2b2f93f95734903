"""Prefixes that the region evicted: found again in host memory, and on disk after a restart, token-exact."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair

NUM_TOKENS = 12
FLAGS = {"model.max_model_len": "512", "kv.num_blocks": "16", "kv.host_cache_bytes": "32MiB"}
PROMPTS = {name: random.Random(name).choices(range(3, 500), k=300) for name in "abc"}  # two of them fill the region


@contextmanager
def engines(folder: Path, **more: str) -> Iterator[EnginePair]:
    pair = EnginePair(folder, TINY_CHAT, flags={**FLAGS, **more})
    try:
        yield pair
    finally:
        pair.close()


def answers(pair: EnginePair, names: str, round_: str) -> dict[str, list[int]]:
    """Output of each prompt, one after the other."""
    found = {}
    for name in names:
        rid = name + round_
        pair.add(rid, PROMPTS[name], max_tokens=NUM_TOKENS, ignore_eos=True)
        pair.run(lambda rid=rid: (rid, 0) in pair.decode.finished)  # type: ignore[misc]
        found[name] = pair.output(rid)
    return found


def counters(pair: EnginePair) -> dict[str, float]:
    return pair.prefill.engine.core.stats().counters


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    with engines(tmp_path_factory.mktemp("plain"), **{"kv.enable_prefix_caching": "false"}) as pair:
        return answers(pair, "abc", "")


def test_an_evicted_prefix_comes_back_from_host_memory(tmp_path: Path, expected: dict[str, list[int]]) -> None:
    with engines(tmp_path) as pair:
        assert answers(pair, "abc", "1") == expected
        assert counters(pair)["tier_spilled_blocks"] > 0
        before = counters(pair)["prefix_hit_tokens"]
        assert answers(pair, "a", "2") == {"a": expected["a"]}
        assert counters(pair)["tier_restored_blocks"] > 0
        assert counters(pair)["prefix_hit_tokens"] - before == 288, "all full blocks of the prompt"
        assert pair.blocks_in_use() == {}


def test_a_damaged_block_is_computed_again(tmp_path: Path, expected: dict[str, list[int]]) -> None:
    with engines(tmp_path) as pair:
        answers(pair, "abc", "1")
        host = pair.prefill.engine.tiers._host  # type: ignore[union-attr]
        host._memory[:] = bytes(len(host._memory))
        assert answers(pair, "a", "2") == {"a": expected["a"]}
        assert counters(pair)["tier_damaged_blocks"] > 0
        assert counters(pair)["tier_restored_blocks"] == 0


def test_a_prefix_on_disk_outlives_its_worker(tmp_path: Path, expected: dict[str, list[int]]) -> None:
    with engines(tmp_path, **{"kv.disk_cache_bytes": "64MiB"}) as pair:
        assert answers(pair, "abc", "1") == expected
    with engines(tmp_path, **{"kv.disk_cache_bytes": "64MiB"}) as pair:
        assert counters(pair)["tier_disk_blocks"] > 0
        assert answers(pair, "a", "2") == {"a": expected["a"]}
        assert counters(pair)["tier_prefetched_blocks"] > 0
        assert counters(pair)["tier_restored_blocks"] > 0
