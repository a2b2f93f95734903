"""Ranks that compute one model together: token for token what one rank gives, whoever hands over to whom."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from engines.errors import DeviceUnavailable
from tests.cluster import TINY_CHAT, Cluster, running_cluster, wait_until
from tests.engine_pair import EnginePair
from tests.stopwatch import Stopwatch

PROMPTS = [json.loads(line)["prompt_ids"] for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()[:12]]
NOTICED_S = 2.0  # the death of a rank or of its engine, by the other


def answers(folder: Path, **flags: str) -> list[list[int]]:
    """Greedy answers to all prompts at once, from two engines with these settings."""
    pair = EnginePair(folder, TINY_CHAT, flags=flags)
    try:
        for i, prompt in enumerate(PROMPTS):
            pair.add(f"r{i}", prompt, max_tokens=24, ignore_eos=True)
        pair.run(lambda: len(pair.decode.finished) == len(PROMPTS), timeout_s=240)
        assert pair.blocks_in_use() == {}
        return [pair.output(f"r{i}") for i in range(len(PROMPTS))]
    finally:
        pair.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    return answers(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)], ids=lambda sizes: f"{sizes[0]}-to-{sizes[1]}")
def test_ranks_change_no_token(tmp_path: Path, sizes: tuple[int, int], expected: list[list[int]]) -> None:
    flags = {"prefill.tensor_parallel_size": str(sizes[0]), "decode.tensor_parallel_size": str(sizes[1])}
    assert answers(tmp_path, **flags) == expected


def test_ranks_on_torchs_own_attention_change_no_token(tmp_path: Path, expected: list[list[int]]) -> None:
    flags = {"prefill.tensor_parallel_size": "2", "engine.kernels": "torch", "engine.linear": "torch"}
    assert answers(tmp_path, **flags) == expected


def test_a_model_that_cannot_be_cut_so_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DeviceUnavailable, match=r"num_key_value_heads=2 .* is not a multiple"):
        EnginePair(tmp_path, TINY_CHAT, flags={"prefill.tensor_parallel_size": "4"})


def ranks_of(engine_pid: int) -> list[int]:
    """Its rank processes."""
    children = Path(f"/proc/{engine_pid}/task/{engine_pid}/children").read_text().split()
    return [int(pid) for pid in children if b"rank_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def has_ended(pid: int) -> bool:
    """Gone, or only waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def engine_pid(cluster: Cluster, role: str) -> int:
    pids = cluster.worker(role)["engine_pids"]
    return int(pids[0]) if pids else 0


@pytest.mark.chaos
def test_a_ranks_death_is_the_engines_death_and_nobody_elses(tmp_path: Path, expected: list[list[int]]) -> None:
    flags = ("--dtype", "float32", "--set", "prefill.tensor_parallel_size=2", "--set", "decode.tensor_parallel_size=2")
    with running_cluster(tmp_path, *flags) as cluster:
        assert cluster.complete_ids(PROMPTS[0], 24, ignore_eos=True) == expected[0]
        engine = engine_pid(cluster, "decode")
        (rank,) = ranks_of(engine)
        with Stopwatch() as watch:
            os.kill(rank, signal.SIGKILL)
            wait_until(lambda: has_ended(engine), timeout_s=30, what="the engine ends with its rank")
        watch.assert_within(NOTICED_S)
        wait_until(lambda: engine_pid(cluster, "decode") not in (0, engine), timeout_s=240, what="another engine")
        assert cluster.complete_ids(PROMPTS[0], 24, ignore_eos=True) == expected[0]

        (rank,) = ranks_of(engine_pid(cluster, "decode"))
        engine = engine_pid(cluster, "decode")
        with Stopwatch() as watch:
            os.kill(engine, signal.SIGKILL)
            wait_until(lambda: has_ended(rank), timeout_s=30, what="the rank ends with its engine")
        watch.assert_within(NOTICED_S)
