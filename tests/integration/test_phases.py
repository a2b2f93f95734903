"""The phases of requests that went through a real cluster: no gaps, none twice, and a hand-off that can be read off.

`total` is the state server's own, from its stamps of the acceptance and of the end. The phases are stopwatches of two
workers, which relate to the server's clock by two estimates of their own. So the sum closes only if the stamps of the
prefill worker, of both KV threads and of the decode worker lie where they should.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.state.phases import PHASES
from tests.cluster import Cluster, Stream, read_streams, running_cluster, wait_until

NUM_ROUNDS, NUM_TOGETHER = 15, 4
CLOSES_WITHIN_MS = 1.0


@pytest.fixture(scope="module", params=["shm", "tcp"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    run_dir: Path = tmp_path_factory.mktemp("phases")
    flags = ("--dtype", "float32", "--set", f"transfer.protocol={request.param}")
    with running_cluster(run_dir, *flags) as cluster:
        yield cluster


def body(seed: int, max_tokens: int = 16) -> dict[str, Any]:
    prompt = [300 + (37 * seed + i) % 190 for i in range(20 + seed % 60)]
    return {"model": "tiny-chat", "prompt": prompt, "temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}


def timings_of(cluster: Cluster, stream: Stream) -> dict[str, float]:
    """Of a request that has ended, once both workers have told theirs."""
    seen: dict[str, float] = {}

    def is_whole() -> bool:
        seen.update(cluster.get(f"/v1/requests/{stream.request_id}").json()["timings_ms"])
        return "closure" in seen

    wait_until(is_whole, timeout_s=5, what=f"all phases of {stream.request_id}")
    return seen


def test_phases_of_every_request_add_up_to_its_time_within_a_millisecond(cluster: Cluster) -> None:
    streams: list[Stream] = []
    for i in range(NUM_ROUNDS):
        streams += asyncio.run(read_streams(cluster.url, [body(NUM_TOGETHER * i + j) for j in range(NUM_TOGETHER)]))

    timings = [timings_of(cluster, stream) for stream in streams]

    assert len(timings) == NUM_ROUNDS * NUM_TOGETHER >= 50
    for seen in timings:
        assert all(seen[name] >= 0 for name in PHASES), seen
        off_ms = sum(seen[name] for name in PHASES) - seen["total"]
        assert abs(off_ms) <= CLOSES_WITHIN_MS, seen
        assert seen["closure"] == pytest.approx(off_ms, abs=0.01)
    for name in ("handoff", "decode_wait", "transfer"):
        ordered = sorted(seen[name] for seen in timings)
        print(f"{name}: p50 {ordered[len(ordered) // 2]:.2f} ms, longest {ordered[-1]:.2f} ms")


def test_stamps_of_the_server_lie_between_the_phases_that_the_workers_measured(cluster: Cluster) -> None:
    (stream,) = asyncio.run(read_streams(cluster.url, [body(7)]))

    seen = timings_of(cluster, stream)

    sampled_ms = seen["queue"] + seen["reserve"] + seen["prefill"]
    assert sampled_ms - CLOSES_WITHIN_MS <= seen["ttft"], "the first token was published before it was sampled"
    assert seen["ttft"] <= seen["total"]
    assert seen["handoff"] == pytest.approx(seen["transfer"] + seen["decode_wait"], abs=0.01)


def test_command_shows_the_phases_that_the_api_tells(cluster: Cluster) -> None:
    (stream,) = asyncio.run(read_streams(cluster.url, [body(9)]))
    seen = timings_of(cluster, stream)
    command = ("request", stream.request_id, "--run-dir", str(cluster.run_dir))

    shown = json.loads(cluster.cli(*command, "--json").stdout)["timings_ms"]

    assert shown.keys() >= {*PHASES, "handoff", "ttft", "total", "closure"}
    assert shown == {name: seen[name] for name in shown}
    lines = cluster.cli(*command).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(PHASES)


def test_phases_of_a_request_are_counted_by_the_gateway(cluster: Cluster) -> None:
    (stream,) = asyncio.run(read_streams(cluster.url, [body(11)]))
    timings_of(cluster, stream)

    def counts() -> dict[str, float]:
        lines = cluster.get("/metrics").text.splitlines()
        names = [*PHASES, "handoff"]
        return {n: float(x.split()[1]) for n in names for x in lines if x.startswith(f"celeriac_{n}_seconds_count ")}

    # After a second, when the end is settled.
    wait_until(lambda: min(counts().values(), default=0) >= 1, timeout_s=8, what="an observation of every phase")
    assert set(counts()) == {*PHASES, "handoff"}
