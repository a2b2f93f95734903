"""Structured outputs and tools through every real process, with plain HTTP and the official `openai` package."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pydantic
import pytest

from tests.cluster import TINY_CHAT, Cluster, running_cluster, wait_until

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]
JSON_PROMPTS = [p for p in PROMPTS if p["skill"] == "json"]
CALL_PROMPTS = [p for p in PROMPTS if p["skill"] == "tools" and "<tool_call>" in p["text"] and len(p["messages"]) < 3]
HELLO = [{"role": "user", "content": "Hello!"}]
PERSON = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["city", "age"],
    "additionalProperties": False,
}
NAMED = {"type": "function", "function": {"name": "get_time"}}


class Person(pydantic.BaseModel):
    city: str
    age: int


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    run_dir: Path = tmp_path_factory.mktemp("structured")
    with running_cluster(run_dir, "--dtype", "float32") as cluster:
        yield cluster
        wait_until(lambda: not any(cluster.blocks_in_use().values()), timeout_s=30, what="every block free again")


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)


def _body(fields: dict[str, Any]) -> dict[str, Any]:
    return {"model": "tiny-chat", "messages": HELLO, "temperature": 0, "max_tokens": 80, **fields}


def _chat(cluster: Cluster, **fields: Any) -> dict[str, Any]:
    response = cluster.post("/v1/chat/completions", _body(fields))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def _stream(cluster: Cluster, path: str = "", headers: dict[str, str] | None = None, **fields: Any) -> list[Any]:
    """Chunks with the event id of each; the stream ended as it should."""
    if path:
        response = httpx.get(cluster.url + path, headers=headers, timeout=30, trust_env=False)
    else:
        ids = {"x-stream-ids": "1"}
        response = cluster.post("/v1/chat/completions", _body({**fields, "stream": True}), headers=ids)
    assert response.status_code == 200, response.text
    blocks = [block for block in response.text.split("\n\n") if block.strip()]
    assert blocks.pop() == "data: [DONE]"
    chunks = []
    for block in blocks:
        lines = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        chunks.append((json.loads(lines["data"]), lines.get("id", "")))
    return chunks


def _joined(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """One choice of a stream in the form of a whole answer's."""
    content, calls, reasons, ids, logprobs = "", [], [], [], []
    for chunk, _ in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            ids += choice.get("token_ids", [])
            logprobs += (choice["logprobs"] or {}).get("content", [])
            reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            content += choice["delta"].get("content") or ""
            for part in choice["delta"].get("tool_calls", []):
                if "id" in part:
                    assert part["index"] == len(calls)
                    calls.append({"id": "", "type": part["type"], "function": {**part["function"]}})
                else:
                    calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return {"content": content, "calls": calls, "reasons": reasons, "ids": ids, "logprobs": logprobs}


def _whole(choice: dict[str, Any]) -> dict[str, Any]:
    message = choice["message"]
    return {
        "content": message["content"] or "",
        "calls": [{**call, "id": ""} for call in message.get("tool_calls", [])],
        "reasons": [choice["finish_reason"]],
        "ids": choice.get("token_ids", []),
        "logprobs": (choice["logprobs"] or {}).get("content", []),
    }


# ---------------------------------------------------------------- structured outputs
@pytest.mark.parametrize("prompt", JSON_PROMPTS, ids=lambda p: p["text"][:20])
def test_a_constraint_that_the_model_meets_anyway_changes_no_token(cluster: Cluster, prompt: dict[str, Any]) -> None:
    free = _chat(cluster, messages=prompt["messages"], return_token_ids=True)
    bound = _chat(cluster, messages=prompt["messages"], return_token_ids=True, response_format={"type": "json_object"})

    assert free["choices"][0]["message"]["content"] == prompt["text"]
    assert bound["choices"] == free["choices"]


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"),
        ({"choice": ["red", 'green "kite"']}, 'red|green "kite"'),
        ({"grammar": 'start: "<" /[a-z]{1,4}/ ">"'}, "<[a-z]{1,4}>"),
        ({"json": {"enum": ["yes", "no", 7]}}, '"yes"|"no"|7'),
    ],
)
def test_every_choice_matches_at_any_temperature(cluster: Cluster, constraint: dict[str, Any], pattern: str) -> None:
    answer = _chat(cluster, structured_outputs=constraint, n=4, temperature=1.5, seed=5, logprobs=True, top_logprobs=2)
    for choice in answer["choices"]:
        assert re.fullmatch(pattern, choice["message"]["content"])
        assert choice["finish_reason"] == "stop"
        text = b"".join(bytes(t["bytes"]) for t in choice["logprobs"]["content"]).decode()
        assert text == choice["message"]["content"]


def test_completions_take_constraints_too(cluster: Cluster) -> None:
    body = {"prompt": ["Hello", "Hi"], "max_tokens": 30, "temperature": 0, "structured_outputs": {"regex": "(ab){3}"}}
    answer = cluster.post("/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == ["ababab", "ababab"]


def test_a_stop_string_inside_of_an_output_ends_it_and_the_limit_cuts_it(cluster: Cluster) -> None:
    fields = {"structured_outputs": {"regex": "a{500}"}}
    stopped = _chat(cluster, **fields, stop=["aaaaa"])["choices"][0]
    cut = _chat(cluster, **fields, max_tokens=3)["choices"][0]
    assert (stopped["finish_reason"], stopped["stop_reason"]) == ("stop", "aaaaa")
    assert cut["finish_reason"] == "length"
    assert set(cut["message"]["content"]) == {"a"}


def test_an_output_that_other_fields_forbid_fails_by_name_and_harms_nobody(cluster: Cluster) -> None:
    token = cluster.post("/tokenize", {"prompt": "x"}).json()["tokens"]
    body = _body({"structured_outputs": {"regex": "abc"}, "allowed_token_ids": token})
    response = cluster.post("/v1/chat/completions", body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == "constraint_failed"
    assert _chat(cluster, structured_outputs={"regex": "abc"})["choices"][0]["message"]["content"] == "abc"


def test_a_bad_schema_is_refused_at_submission_also_of_a_stream(cluster: Cluster) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"a": {"type": "strng"}}}}}
    response = cluster.post("/v1/chat/completions", _body({"response_format": bad, "stream": True}))
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "response_format.json_schema.schema")
    assert "#/properties/a/type" in error["message"]


def test_the_sdk_parses_an_answer_into_a_model(client: openai.OpenAI) -> None:
    messages = JSON_PROMPTS[1]["messages"]
    fields = {"model": "tiny-chat", "messages": messages, "temperature": 0, "response_format": Person}
    answer = client.chat.completions.parse(**fields, max_tokens=80)
    assert answer.choices[0].message.parsed == Person(city="Rabat", age=18)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**fields, max_tokens=3)


# ---------------------------------------------------------------- tools
@pytest.mark.parametrize("prompt", CALL_PROMPTS, ids=lambda p: p["messages"][-1]["content"][:20])
@pytest.mark.parametrize("tool_choice", ["auto", "required"])
def test_the_call_that_the_model_makes_is_told_whole_and_streamed(
    cluster: Cluster, prompt: dict[str, Any], tool_choice: str
) -> None:
    fields = {"messages": prompt["messages"], "tools": prompt["tools"], "tool_choice": tool_choice}
    fields |= {"return_token_ids": True, "logprobs": True, "top_logprobs": 1}
    written = json.loads(prompt["text"].removeprefix("<tool_call>").removesuffix("</tool_call>"))

    choice = _chat(cluster, **fields)["choices"][0]
    joined = _joined(_stream(cluster, **fields))

    (call,) = choice["message"]["tool_calls"]
    assert re.fullmatch("call_[A-Za-z0-9]{24,}", call["id"])
    assert call["function"]["name"] == written["name"]
    assert json.loads(call["function"]["arguments"]) == written["arguments"]
    assert choice["message"]["content"] is None
    assert choice["finish_reason"] == "tool_calls"
    assert choice["token_ids"] == prompt["completion_ids"]
    assert joined == _whole(choice)


def test_a_model_that_calls_nothing_answers_with_text(cluster: Cluster) -> None:
    prompt = next(p for p in PROMPTS if p["skill"] == "tools" and p["text"] == "A lemon is yellow.")
    choice = _chat(cluster, messages=prompt["messages"], tools=prompt["tools"])["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "A lemon is yellow.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_a_named_function_is_called_and_ends_with_stop(cluster: Cluster) -> None:
    choice = _chat(cluster, tools=CALL_PROMPTS[0]["tools"], tool_choice=NAMED)["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "get_time"
    assert list(json.loads(call["function"]["arguments"])) == ["city"]
    assert choice["finish_reason"] == "stop"


def test_a_call_cut_by_the_limit_keeps_its_partial_arguments(cluster: Cluster) -> None:
    fields = {"tools": CALL_PROMPTS[0]["tools"], "tool_choice": "required", "max_tokens": 16}
    choice = _chat(cluster, **fields)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")
    assert _joined(_stream(cluster, **fields)) == _whole(choice)


def test_no_call_is_read_out_of_the_text_with_tool_choice_none(cluster: Cluster) -> None:
    prompt = CALL_PROMPTS[0]
    choice = _chat(cluster, messages=prompt["messages"], tools=prompt["tools"], tool_choice="none")["choices"][0]
    assert "tool_calls" not in choice["message"]


def test_tools_and_a_json_format_allow_a_call_or_such_an_answer(cluster: Cluster) -> None:
    fields = {"tools": CALL_PROMPTS[0]["tools"], "response_format": {"type": "json_object"}}
    call = _chat(cluster, messages=CALL_PROMPTS[0]["messages"], **fields)["choices"][0]
    text = _chat(cluster, messages=JSON_PROMPTS[0]["messages"], **fields)["choices"][0]
    assert call["message"]["tool_calls"][0]["function"]["name"] == "get_user"
    assert isinstance(json.loads(text["message"]["content"]), dict)


def test_a_stream_with_calls_goes_on_behind_every_position(cluster: Cluster) -> None:
    prompt = CALL_PROMPTS[1]
    fields = {"messages": prompt["messages"], "tools": prompt["tools"], "return_token_ids": True, "n": 2}
    chunks = _stream(cluster, **fields)
    request_id = chunks[0][0]["id"]
    whole = [_joined(chunks, c) for c in (0, 1)]
    positions = [i for i, (_, position) in enumerate(chunks) if position]
    assert len(positions) > 10
    for i in positions[:: max(1, len(positions) // 8)]:
        rest = _stream(cluster, f"/v1/requests/{request_id}/stream", {"Last-Event-ID": chunks[i][1]})
        assert [_joined(chunks[: i + 1] + rest, c) for c in (0, 1)] == whole


def test_the_sdk_makes_a_round_trip_with_a_tool(client: openai.OpenAI) -> None:
    prompt = CALL_PROMPTS[1]
    messages: list[Any] = list(prompt["messages"])
    fields = {"model": "tiny-chat", "tools": prompt["tools"], "temperature": 0, "max_tokens": 60}
    with client.chat.completions.stream(**fields, messages=messages) as stream:
        events = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in events
    (call,) = message.tool_calls
    assert json.loads(call.function.arguments) == {"a": 865, "b": 97}

    messages += [message.model_dump(exclude_none=True, include={"role", "content", "tool_calls"})]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": '{"result": 83905}'}]
    answer = client.chat.completions.create(**fields, messages=messages)
    assert "83905" in (answer.choices[0].message.content or "")

    messages[-1]["tool_call_id"] = "call_of_nobody"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**fields, messages=messages)
    assert caught.value.param == f"messages[{len(messages) - 1}].tool_call_id"


# ---------------------------------------------------------------- exactness
def test_disaggregated_and_monolithic_choose_the_same_tokens_under_constraints(
    cluster: Cluster, tmp_path: Path
) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    cases = [
        {"messages": p["messages"], "response_format": schema, "temperature": t, "seed": 3, "n": n}
        for p in JSON_PROMPTS[:2]
        for t, n in ((0, 1), (0.9, 3))
    ]
    cases.append({"tools": CALL_PROMPTS[0]["tools"], "tool_choice": "required", "temperature": 1.2, "seed": 9, "n": 2})
    cases.append({"structured_outputs": {"regex": "([a-z]{2,7} ){6}end"}, "temperature": 1.0, "seed": 1})

    def ids(on: Cluster) -> list[list[list[int]]]:
        answers = [_chat(on, **case, return_token_ids=True) for case in cases]
        return [[choice["token_ids"] for choice in answer["choices"]] for answer in answers]

    disaggregated = ids(cluster)
    with running_cluster(tmp_path, "--dtype", "float32", "--both", "1") as other:
        assert ids(other) == disaggregated
