"""The official SDK against a live gateway; a publisher plays the workers through the real state functions."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx2 as httpx
import openai
import pytest

from engines.tokenizer import Tokenizer
from kvstore.state import EmbeddedValkey
from tests.gateway_harness import TINY_CHAT, LiveGateway, Publisher

REPLY = "Hello! 1, 2, 3 \U0001f600 done."
CHAT = {"model": "tiny-chat", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY_CHAT)


@pytest.fixture(scope="module")
def publisher(valkey_server: EmbeddedValkey, tokenizer: Tokenizer) -> Iterator[Publisher]:
    publisher = Publisher(valkey_server.url, tokenizer, REPLY)
    publisher.start()
    yield publisher
    publisher.stop()


@pytest.fixture(scope="module")
def gateway(valkey_server: EmbeddedValkey, publisher: Publisher) -> Iterator[LiveGateway]:
    assert publisher.has_workers
    gateway = LiveGateway(valkey_server.url)
    yield gateway
    gateway.stop()


@pytest.fixture(scope="module")
def client(gateway: LiveGateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_chat_answers_whole_with_usage_and_fingerprint(client: openai.OpenAI, publisher: Publisher) -> None:
    answer = client.chat.completions.create(**CHAT)

    assert answer.choices[0].message.content == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(publisher.reply_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.system_fingerprint.startswith("fp_") and answer.system_fingerprint.endswith("-exact")


def test_streamed_text_usage_and_ends_equal_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, n=2)
    chunks = list(client.chat.completions.create(**CHAT, n=2, stream=True, stream_options={"include_usage": True}))

    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(c.delta.content or "" for c in own) == whole.choices[index].message.content
        assert [c.delta.role for c in own if c.delta.role] == ["assistant"]
        assert [c.finish_reason for c in own if c.finish_reason] == [whole.choices[index].finish_reason]
        assert own[-1].delta.content is None
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])


def test_each_prompt_form_is_served_and_indices_follow_prompts(client: openai.OpenAI) -> None:
    for prompt, num_choices in (("Hi", 2), (["Hi", "Ho"], 4), ([5, 6, 7], 2), ([[5], [6, 7], [8]], 6)):
        answer = client.completions.create(model="tiny-chat", prompt=prompt, n=2, max_tokens=4)
        assert [c.index for c in answer.choices] == list(range(num_choices))
        assert len({c.text for c in answer.choices}) == 1
        assert answer.usage.completion_tokens == 4 * num_choices


def test_token_ids_are_told_whole_and_streamed(client: openai.OpenAI, publisher: Publisher) -> None:
    fields = {"model": "tiny-chat", "prompt": [5, 6, 7], "max_tokens": 64, "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True))

    assert whole.choices[0].token_ids == publisher.reply_ids
    assert whole.choices[0].prompt_token_ids == [5, 6, 7]
    streamed = [i for c in chunks for i in c.choices[0].token_ids]
    assert streamed == publisher.reply_ids
    assert chunks[0].choices[0].prompt_token_ids == [5, 6, 7]


def test_stop_strings_and_length_end_with_their_reasons(client: openai.OpenAI) -> None:
    stopped = client.chat.completions.create(**CHAT, stop=["2,", "zzz"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("Hello! 1, ", "stop")
    assert stopped.choices[0].stop_reason == "2,"
    cut = client.chat.completions.create(**CHAT, max_completion_tokens=2)
    assert cut.choices[0].finish_reason == "length"


def test_logprobs_bytes_join_to_the_text(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == REPLY
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].token == t.token for t in content)
    chunks = list(client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, stream=True))
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == content


def test_completion_logprobs_have_offsets_and_echo_comes_first(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny-chat", prompt="Hi", max_tokens=5, logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 5
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])
    echoed = client.completions.create(model="tiny-chat", prompt="Hi", max_tokens=5, echo=True)
    assert echoed.choices[0].text == "Hi" + answer.choices[0].text
    streamed = client.completions.create(model="tiny-chat", prompt="Hi", max_tokens=5, echo=True, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == echoed.choices[0].text


def test_max_tokens_zero_with_echo_gives_the_prompt_back(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny-chat", prompt="Hi", max_tokens=0, echo=True)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hi", "length")
    assert answer.usage.completion_tokens == 0


def test_request_ids_and_the_usual_headers_come_back(client: openai.OpenAI, gateway: LiveGateway) -> None:
    raw = client.chat.completions.with_raw_response.create(**CHAT, extra_headers={"x-request-id": "my-id.1"})
    assert raw.headers["x-request-id"] == "my-id.1"
    assert raw.headers["openai-version"] == "2020-10-01"
    assert raw.headers["openai-model"] == "tiny-chat"
    bad = gateway.client.get("/nowhere", headers={"x-request-id": "no good"})
    assert bad.headers["x-request-id"].startswith("req-")


def test_the_raw_stream_is_what_sdks_read(gateway: LiveGateway) -> None:
    with gateway.client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as reply:
        lines = list(reply.iter_lines())
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"
    assert lines[-2:] == ["data: [DONE]", ""]
    first = json.loads(lines[0].removeprefix("data: "))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert not any(line.startswith("id:") for line in lines)


def test_the_streaming_helper_of_the_sdk_accumulates(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**CHAT) as stream:
        assert stream.get_final_completion().choices[0].message.content == REPLY


def test_models_tokens_and_operations_answer(client: openai.OpenAI, gateway: LiveGateway) -> None:
    assert [m.id for m in client.models.list()] == ["tiny-chat"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("org/name")
    assert caught.value.code == "model_not_found"
    http = gateway.client
    tokens = http.post("/tokenize", json={"prompt": "Hello", "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "Hello"}
    chat = http.post("/tokenize", json={"messages": CHAT["messages"]}).json()
    assert http.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"].endswith("assistant\n")
    assert http.get("/health").status_code == http.get("/ping").status_code == 200
    assert http.get("/ready").json() == {
        "ready": True,
        "checks": {"redis": True, "prefill": True, "decode": True, "accepting": True},
    }
    assert "version" in http.get("/version").json()


def test_a_request_can_be_looked_at_afterwards_and_is_counted(gateway: LiveGateway) -> None:
    answer = gateway.client.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 3, "metadata": {"a": "b"}})
    seen = gateway.client.get(f"/v1/requests/{answer.json()['id']}").json()

    assert seen["id"] == answer.json()["id"]
    assert (seen["state"], seen["finish_reason"], seen["completion_tokens"]) == ("finished", "length", 3)
    assert seen["timings_ms"]["total"] >= 0
    assert seen["metadata"] == {"a": "b"}
    assert gateway.client.get("/v1/requests/aaaa-s00").status_code == 404
    metrics = gateway.client.get("/metrics").text
    assert 'celeriac_kv_blocks{node="d0@here",state="free"} 90.0' in metrics
    assert 'celeriac_requests_total{state="finished"}' in metrics
    assert "celeriac_ttft_seconds_count" in metrics


def test_the_async_client_runs_many_streams_at_once(gateway: LiveGateway) -> None:
    import asyncio

    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:

            async def one() -> str:
                stream = await client.chat.completions.create(**CHAT, stream=True)
                return "".join([c.choices[0].delta.content or "" async for c in stream])

            return await asyncio.gather(*(one() for _ in range(16)))

    assert asyncio.run(run()) == [REPLY] * 16


def test_unknown_fields_are_told_in_a_header(gateway: LiveGateway) -> None:
    answer: httpx.Response = gateway.client.post("/v1/chat/completions", json={**CHAT, "temprature": 1})
    assert answer.status_code == 200
    assert answer.headers["x-ignored-fields"] == "temprature"
