"""A short form of `python -m tests.thousand`: a hundred prompts over the ways that use the most parts at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.thousand.prompts import make_prompts
from tests.thousand.ways import WAYS, disaggregated, monolithic

PROMPTS = make_prompts(100)
BUSY = [way for way in WAYS if way.is_shared and "rank" not in way.name]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return monolithic(tmp_path_factory.mktemp("one"), PROMPTS)


@pytest.mark.parametrize("way", BUSY, ids=lambda way: way.name.partition(", write-back")[0])
def test_disaggregated_output_equals_monolithic_output(way, tmp_path: Path, expected: list[list[int]]) -> None:  # type: ignore[no-untyped-def]
    if way.protocol == "rdma" and importlib.util.find_spec("nixl_cu12") is None:
        pytest.skip("NIXL is not installed (EXTRAS=rdma)")
    answers, counters = disaggregated(way, tmp_path, PROMPTS)
    assert answers == expected
    assert counters["kv_arrived_bytes"] > 0
    assert counters["prefix_kept_blocks"] > 0
    assert counters["prefix_fetches"] > 0
    assert counters["tier_restored_blocks"] > 0
