"""The official `openai` package against a real cluster."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import openai
import pytest

from tests.cluster import TINY_CHAT, running_cluster

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]
COUNT = [{"role": "user", "content": "Count to 30."}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with running_cluster(tmp_path_factory.mktemp("sdk"), "--dtype", "float32") as cluster:
        yield openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)


def test_models_are_listed_and_an_unknown_one_is_not_found(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny-chat"]
    assert client.models.retrieve("tiny-chat").id == "tiny-chat"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such/model")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_streamed_and_whole_answers_are_equal(client: openai.OpenAI, temperature: float) -> None:
    fields = {"model": "tiny-chat", "messages": COUNT, "temperature": temperature, "seed": 7, "max_tokens": 60}
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))

    deltas = [c.choices[0] for c in chunks if c.choices]
    assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
    assert sum(d.delta.role == "assistant" for d in deltas) == 1
    assert [d.finish_reason for d in deltas if d.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_n_choices_of_one_seed_differ_and_come_again(client: openai.OpenAI, n: int) -> None:
    fields = {
        "model": "tiny-chat",
        "prompt": "Tell me a story",
        "n": n,
        "temperature": 1.0,
        "seed": 11,
        "max_tokens": 24,
    }
    first = client.completions.create(**fields)
    second = client.completions.create(**fields)

    assert [c.index for c in first.choices] == list(range(n))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) == n
    assert first.usage.completion_tokens <= 24 * n


def test_each_prompt_of_a_list_gets_its_choices_in_order(client: openai.OpenAI) -> None:
    prompts = [p["prompt_ids"] for p in PROMPTS[:3]]
    answer = client.completions.create(model="tiny-chat", prompt=prompts, n=2, temperature=0, max_tokens=64)

    assert [c.index for c in answer.choices] == list(range(6))
    assert [answer.choices[2 * i].text for i in range(3)] == [p["text"] for p in PROMPTS[:3]]


def test_greedy_n_gives_equal_copies(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny-chat", messages=COUNT, n=3, temperature=0, max_tokens=20)
    assert len({c.message.content for c in answer.choices}) == 1


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny-chat", messages=COUNT, temperature=0, stop=["12, 13", "zzz"])

    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content.endswith("11, ")
    assert "12" not in answer.choices[0].message.content


def test_logprobs_belong_to_the_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-chat", messages=COUNT, temperature=0, max_tokens=8, logprobs=True, top_logprobs=4
    )

    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert b"".join(bytes(t.bytes) for t in content).decode() == answer.choices[0].message.content
    for token in content:
        assert token.token == token.top_logprobs[0].token
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob, abs=1e-5)
        assert sum(math.exp(t.logprob) for t in token.top_logprobs) <= 1 + 1e-4


def test_completion_logprobs_and_echo(client: openai.OpenAI) -> None:
    fields = {"model": "tiny-chat", "prompt": "Count to 30.", "temperature": 0, "max_tokens": 4}
    plain = client.completions.create(**fields, logprobs=2)
    echoed = client.completions.create(**fields, echo=True)

    assert echoed.choices[0].text == "Count to 30." + plain.choices[0].text
    assert "".join(plain.choices[0].logprobs.tokens) == plain.choices[0].text
    assert all(len(top) == 2 for top in plain.choices[0].logprobs.top_logprobs)


def test_request_ids_come_back(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="tiny-chat", messages=COUNT, max_tokens=2, extra_headers={"x-request-id": "my-id.1"}
    )
    assert raw.headers["x-request-id"] == "my-id.1"
    assert raw.parse()._request_id == "my-id.1"


@pytest.mark.parametrize(
    ("fields", "error", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"temperature": 3.5}, openai.BadRequestError, "out_of_range", "temperature"),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded", None),
        ({"messages": []}, openai.BadRequestError, None, "messages"),
        ({"response_format": {"type": "xml"}}, openai.BadRequestError, "invalid_value", "response_format.type"),
        ({"top_logprobs": 3}, openai.BadRequestError, None, "top_logprobs"),
    ],
)
def test_errors_have_their_class_code_and_param(
    client: openai.OpenAI, fields: dict, error: type[openai.APIStatusError], code: str | None, param: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**{"model": "tiny-chat", "messages": COUNT, "max_tokens": 4, **fields})
    if code:
        assert caught.value.code == code
    if param:
        assert caught.value.param == param
    assert client.chat.completions.create(model="tiny-chat", messages=COUNT, max_tokens=2).choices
