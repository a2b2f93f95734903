"""One prompt through every real process: HTTP, Celery, prefill, KV push, decode, Redis, SSE."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import TINY_CHAT, Cluster, read_streams, running_cluster, wait_until

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    run_dir: Path = tmp_path_factory.mktemp("first-light")
    with running_cluster(run_dir, "--dtype", "float32") as cluster:
        yield cluster


def test_a_chat_prompt_gets_the_answer_of_the_model(cluster: Cluster) -> None:
    prompt = PROMPTS[0]
    body = {"model": "tiny-chat", "messages": prompt["messages"], "temperature": 0, "max_tokens": 64}

    response = cluster.post("/v1/chat/completions", body)

    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["message"]["content"] == prompt["text"]
    assert choice["finish_reason"] == "stop"


def test_a_stream_brings_the_same_tokens_and_ends_once(cluster: Cluster) -> None:
    prompt = PROMPTS[0]
    body = {"model": "tiny-chat", "prompt": prompt["prompt_ids"], "temperature": 0, "max_tokens": 64}

    (stream,) = asyncio.run(read_streams(cluster.url, [body]))

    assert stream.token_ids == [prompt["completion_ids"]]
    assert stream.finish_reasons == ["stop"]
    assert (stream.num_done, stream.errors) == (1, [])


def test_the_request_went_through_a_prefill_and_a_decode_worker(cluster: Cluster) -> None:
    response = cluster.post("/v1/completions", {"prompt": "Hello!", "max_tokens": 4, "temperature": 0})
    state = cluster.get(f"/v1/requests/{response.json()['id']}").json()

    assert state["state"] == "finished"
    assert state["attempt"] == 1
    assert {"queue", "prefill", "transfer", "ttft", "total"} <= state["timings_ms"].keys()


def test_all_blocks_come_back(cluster: Cluster) -> None:
    wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")
