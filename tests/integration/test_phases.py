"""The phases of requests that went through a real cluster: no gaps, none twice, and a hand-off that can be read off.

`total` is the state server's own, from its stamps of the acceptance and of the end. The phases are stopwatches of two
workers, which relate to the server's clock by two estimates of their own. So the sum closes only if the stamps of the
prefill worker, of both KV threads and of the decode worker lie where they should.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.state.phases import PHASES
from tests.cluster import Cluster, Stream, read_streams, running_cluster, wait_until

NUM_ROUNDS, NUM_TOGETHER = 15, 4
WHOLE_S, MAX_UNTOLD = 5.0, 10
MAX_TRIES = 3  # workers know the server's clock as well as its quickest answers told, and a busy machine gives few
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
    """Of a request that has ended; empty where one of the workers has not told its phases within a few seconds.

    A worker that hears that a request is another's before it hears of its own part in that says nothing, which is rare
    and allowed (tasks.front.spans).
    """
    ends_s = time.monotonic() + WHOLE_S
    while time.monotonic() < ends_s:
        seen: dict[str, float] = cluster.get(f"/v1/requests/{stream.request_id}").json()["timings_ms"]
        if "closure" in seen:
            return seen
        time.sleep(0.1)
    return {}


def one_request(cluster: Cluster, seed: int) -> tuple[Stream, dict[str, float]]:
    """One whose phases were all told."""
    for i in range(MAX_TRIES):
        (stream,) = asyncio.run(read_streams(cluster.url, [body(seed + i)]))
        if seen := timings_of(cluster, stream):
            return stream, seen
    raise AssertionError(f"of {MAX_TRIES} requests not all phases were told")


def off_ms(seen: dict[str, float]) -> float:
    """How far the phases miss the total."""
    return sum(seen[name] for name in PHASES) - seen["total"]


def rounds(cluster: Cluster) -> list[dict[str, float]]:
    """The timings of some dozens of requests, a few at a time."""
    streams: list[Stream] = []
    for i in range(NUM_ROUNDS):
        streams += asyncio.run(read_streams(cluster.url, [body(NUM_TOGETHER * i + j) for j in range(NUM_TOGETHER)]))
    found: list[dict[str, float]] = []
    for i, stream in enumerate(streams):
        found += filter(None, [timings_of(cluster, stream)])
        assert i - len(found) < MAX_UNTOLD, f"of {i + 1} requests only {len(found)} have all their phases"
    return found


def test_phases_of_every_request_add_up_to_its_time_within_a_millisecond(cluster: Cluster) -> None:
    for _ in range(MAX_TRIES):
        timings = rounds(cluster)
        if max(abs(off_ms(seen)) for seen in timings) <= CLOSES_WITHIN_MS:
            break

    assert len(timings) >= 50
    for seen in timings:
        assert all(seen[name] >= 0 for name in PHASES), seen
        assert abs(off_ms(seen)) <= CLOSES_WITHIN_MS, seen
        assert seen["closure"] == pytest.approx(off_ms(seen), abs=0.01)
    for name in ("handoff", "decode_wait", "transfer"):
        ordered = sorted(seen[name] for seen in timings)
        print(f"{name}: p50 {ordered[len(ordered) // 2]:.2f} ms, longest {ordered[-1]:.2f} ms")


def test_stamps_of_the_server_lie_between_the_phases_that_the_workers_measured(cluster: Cluster) -> None:
    for i in range(MAX_TRIES * NUM_TOGETHER):
        _, seen = one_request(cluster, 7 + i)
        sampled_ms = seen["queue"] + seen["reserve"] + seen["prefill"]
        if sampled_ms - CLOSES_WITHIN_MS <= seen["ttft"]:
            break

    assert sampled_ms - CLOSES_WITHIN_MS <= seen["ttft"], "the first token was published before it was sampled"
    assert seen["ttft"] <= seen["total"]
    assert seen["handoff"] == pytest.approx(seen["transfer"] + seen["decode_wait"], abs=0.01)


def test_command_shows_the_phases_that_the_api_tells(cluster: Cluster) -> None:
    stream, seen = one_request(cluster, 9)
    command = ("request", stream.request_id, "--run-dir", str(cluster.run_dir))

    shown = json.loads(cluster.cli(*command, "--json").stdout)["timings_ms"]

    assert shown.keys() >= {*PHASES, "handoff", "ttft", "total", "closure"}
    assert shown == {name: seen[name] for name in shown}
    lines = cluster.cli(*command).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(PHASES)


def test_phases_of_a_request_are_counted_by_the_gateway(cluster: Cluster) -> None:
    one_request(cluster, 11)

    def counts() -> dict[str, float]:
        lines = cluster.get("/metrics").text.splitlines()
        names = [*PHASES, "handoff"]
        return {n: float(x.split()[1]) for n in names for x in lines if x.startswith(f"celeriac_{n}_seconds_count ")}

    # After a second, when the end is settled.
    wait_until(lambda: min(counts().values(), default=0) >= 1, timeout_s=30, what="an observation of every phase")
    assert set(counts()) == {*PHASES, "handoff"}
