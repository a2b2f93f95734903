"""The load of the fault tests: 20 streams, half greedy, half seeded, and the claim that a fault changed nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.cluster import Cluster, Stream, read_streams, wait_until

NUM_STREAMS = 20
MAX_TOKENS = 240
MAX_TRIES = 4


def bodies(max_tokens: int = MAX_TOKENS, num_streams: int = NUM_STREAMS) -> list[dict[str, Any]]:
    """Long enough to be in the middle when the fault comes."""
    common = {"max_tokens": max_tokens, "ignore_eos": True}
    stories = [
        f"<|im_start|>user\nCount from {i} to 90.<|im_end|>\n<|im_start|>assistant\n" for i in range(num_streams)
    ]
    return [
        {"prompt": text, "temperature": 0, **common}
        if i % 2
        else {"prompt": text, "temperature": 0.9, "top_p": 0.95, "seed": 1000 + i, **common}
        for i, text in enumerate(stories)
    ]


def assert_same(undisturbed: list[Stream], disturbed: list[Stream]) -> None:
    """The same tokens and text, no gap, no repeat, one end."""
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.errors == []
        assert after.num_done == 1
        assert after.token_ids == before.token_ids
        assert after.texts == before.texts
        assert after.finish_reasons == before.finish_reasons


def all_ready(cluster: Cluster) -> bool:
    """Every worker has its engine, and the gateway takes requests."""
    workers = cluster.status()["workers"]
    is_ready = all(worker["state"] == "ready" and worker["engine_pids"] for worker in workers)
    return is_ready and cluster.get("/ready").status_code == 200


def assert_fault_changes_nothing(
    cluster: Cluster, undisturbed: list[Stream], faults: Iterator[Callable[[], None]], **moment: Any
) -> None:
    """All streams are as they were, with a fault in their midst: the first of `faults`.

    Where a busy machine let a stream end before the fault, there was no such midst: then the next of them.
    """
    for _, fault in zip(range(MAX_TRIES), faults, strict=False):
        began_s: list[float] = []

        def timed(fault: Callable[[], None] = fault, began_s: list[float] = began_s) -> None:
            began_s.append(time.monotonic())
            fault()

        disturbed = asyncio.run(read_streams(cluster.url, bodies(), meanwhile=timed, **moment))

        assert_same(undisturbed, disturbed)
        if min(stream.stamps_s[-1] for stream in disturbed) > began_s[0]:
            return
        print("a stream ended before the fault: once more")
        wait_until(lambda: all_ready(cluster), timeout_s=60, what="all workers ready")
    raise AssertionError(f"a stream ended before the fault, {MAX_TRIES} times")
