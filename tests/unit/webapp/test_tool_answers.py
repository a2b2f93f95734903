"""Chat answers with tool calls: streams and whole answers say the same, however the tokens came."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import ModelSettings
from kvstore.state.entries import FinEntry, TokenEntry, TokenLogprobs
from tests.gateway_harness import TINY_CHAT
from webapp.openai.answers import make_writer
from webapp.openai.call import CallNotes, Prompt
from webapp.openai.pieces import Piece, PieceMaker
from webapp.openai.served_model import ServedModel, load_served_model
from webapp.openai.tool_answers import ToolWriter

CALL = 'Sure.\n<tool_call>\n{"name": "f", "arguments": {"a": [1, "é"]}}\n</tool_call>'


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return load_served_model(ModelSettings(path=str(TINY_CHAT)), version="test")


def _writer(model: ServedModel, *, mode: str = "auto") -> ToolWriter:
    notes = CallNotes(api="chat", created=1, tools=mode, top_logprobs=0, return_token_ids=True)
    writer = make_writer(
        id="chatcmpl-x", model=model, notes=notes, prompts=[Prompt(token_ids=[1])], choices_per_prompt=1
    )
    assert isinstance(writer, ToolWriter)
    return writer


def _pieces(model: ServedModel, text: str, size: int, *, reason: str = "stop") -> list[Piece]:
    """The pieces of a reply whose tokens came `size` at a time."""
    tokenizer = model.tokenizer
    ids = [*tokenizer.encode(text), *tokenizer.eos_token_ids[:1]]
    texts, held = [], b""
    for token_id in ids[:-1]:
        held += tokenizer.token_bytes(token_id)
        released = held.decode("utf-8", "ignore")
        held = held[len(released.encode()) :]
        texts.append(released)
    maker, out = PieceMaker(0), []
    for i in range(0, len(ids), size):
        some = tuple(ids[i : i + size])
        logprobs = tuple(TokenLogprobs(-0.5, ()) for _ in some)
        out += maker.tokens(TokenEntry(i, 0, some, tuple([*texts, ""][i : i + size]), logprobs))
    return out + maker.end(FinEntry("FINISHED", reason, "", ""))


def _joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {"content": "", "names": [], "arguments": [], "ids": [], "num_logprobs": 0, "reasons": []}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        out["content"] += choice["delta"].get("content") or ""
        out["ids"] += choice["token_ids"]
        out["num_logprobs"] += len((choice["logprobs"] or {}).get("content", []))
        out["reasons"] += [choice["finish_reason"]] if choice["finish_reason"] else []
        for call in choice["delta"].get("tool_calls", []):
            if "id" in call:
                out["names"].append((call["id"], call["function"]["name"]))
                out["arguments"].append("")
            out["arguments"][call["index"]] += call["function"]["arguments"]
    return out


def _of_answer(answer: dict[str, Any]) -> dict[str, Any]:
    (choice,) = answer["choices"]
    calls = choice["message"].get("tool_calls", [])
    return {
        "content": choice["message"]["content"] or "",
        "names": [(call["id"], call["function"]["name"]) for call in calls],
        "arguments": [call["function"]["arguments"] for call in calls],
        "ids": choice["token_ids"],
        "num_logprobs": len(choice["logprobs"]["content"]),
        "reasons": [choice["finish_reason"]],
    }


@pytest.mark.parametrize("text", [CALL, "No call here.", "<tool_call>oops", f"{CALL}\n{CALL}", f"{CALL} and more "])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_streams_and_whole_answers_say_the_same(model: ServedModel, text: str, size: int) -> None:
    writer = _writer(model)
    chunks = [chunk for piece in _pieces(model, text, size) for chunk in writer.chunks(0, piece)]
    assert _joined(chunks) == _of_answer(_writer(model).answer([_pieces(model, text, 1)]))


@pytest.mark.parametrize("size", [1, 3])
def test_a_stream_that_goes_on_elsewhere_tells_the_rest_and_nothing_twice(model: ServedModel, size: int) -> None:
    pieces = _pieces(model, CALL, size)
    first = _writer(model)
    whole = [chunk for piece in pieces for chunk in first.chunks(0, piece)]
    writer, told = _writer(model), []
    for piece in pieces:
        told += writer.chunks(0, piece)
        other = _writer(model)
        other.skip([piece.num_tokens], [piece.fin is not None])
        rest = [chunk for again in _pieces(model, CALL, 2) for chunk in other.chunks(0, again)]
        assert _joined([*told, *rest]) == _joined(whole)


@pytest.mark.parametrize(
    ("mode", "reason", "expected"),
    [
        ("auto", "stop", "tool_calls"),
        ("required", "stop", "tool_calls"),
        ("named", "stop", "stop"),
        ("auto", "length", "length"),
        ("required", "length", "length"),
    ],
)
def test_the_end_of_a_reply_with_calls(model: ServedModel, mode: str, reason: str, expected: str) -> None:
    answer = _writer(model, mode=mode).answer([_pieces(model, CALL, 4, reason=reason)])
    assert answer["choices"][0]["finish_reason"] == expected
    assert answer["choices"][0]["message"]["content"] == "Sure."


def test_content_is_null_when_there_are_only_calls(model: ServedModel) -> None:
    answer = _writer(model).answer([_pieces(model, CALL.removeprefix("Sure.\n"), 4)])
    assert answer["choices"][0]["message"]["content"] is None
