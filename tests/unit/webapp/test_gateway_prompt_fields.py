"""Fields in terms of tokens, and how logprobs of a prompt are told."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from configs.schema import ModelSettings
from kvstore.state.entries import FinEntry, PromptLogprobs, TokenEntry, TokenLogprobs
from tests.gateway_harness import TINY_CHAT
from webapp.errors import InvalidRequest, StreamFailed
from webapp.generate import writer_for
from webapp.openai.call import Call
from webapp.openai.chat_body import parse_chat
from webapp.openai.completion_body import parse_completion
from webapp.openai.pieces import Piece, PieceMaker
from webapp.openai.served_model import ServedModel, load_served_model


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return load_served_model(ModelSettings(path=str(TINY_CHAT)), version="test")


def completion(model: ServedModel, **fields: Any) -> Call:
    return parse_completion({"prompt": "The sea is deep", **fields}, model, unknown_fields="reject")


def prompt_scores(num_tokens: int) -> PromptLogprobs:
    """Token i + 1 has logprob -(i + 1) and rank i + 2; ids 7 and 8 are the best everywhere."""
    n = num_tokens - 1
    return PromptLogprobs(
        2,
        array("f", [-1.0 - i for i in range(n)]).tobytes(),
        array("i", [i + 2 for i in range(n)]).tobytes(),
        array("i", [7, 8] * n).tobytes(),
        array("f", [-0.25, -0.5] * n).tobytes(),
    )


def pieces(call: Call, *, scores: PromptLogprobs | None) -> list[Piece]:
    maker = PieceMaker(0)
    logprobs = (TokenLogprobs(-0.125),) if call.notes.top_logprobs is not None else None
    tokens = maker.tokens(TokenEntry(0, 0, (20,), (" x",), logprobs, scores))
    return [*tokens, *maker.end(FinEntry("FINISHED", "stop"))]


def test_truncation_keeps_the_end_or_the_beginning(model: ServedModel) -> None:
    ids = list(range(10, 30))

    def kept(**fields: Any) -> list[int]:
        return completion(model, prompt=ids, **fields).prompts[0].token_ids

    assert kept(truncate_prompt_tokens=4) == ids[-4:]
    assert kept(truncate_prompt_tokens=4, truncation_side="right") == ids[:4]
    assert kept(truncate_prompt_tokens=40) == ids
    long = [5] * (model.max_model_len + 7)
    whole = completion(model, prompt=long, truncate_prompt_tokens=-1, max_tokens=9).prompts[0].token_ids
    assert len(whole) == model.max_model_len - 9


def test_an_echo_of_a_truncated_prompt_is_what_was_kept(model: ServedModel) -> None:
    call = completion(model, prompt="one two three four five six", truncate_prompt_tokens=2, echo=True)

    (prompt,) = call.prompts
    assert len(prompt.token_ids) == 2
    assert prompt.echo == model.tokenizer.decode(prompt.token_ids, False)


def test_a_chat_prompt_is_truncated_too(model: ServedModel) -> None:
    body = {"messages": [{"role": "user", "content": "word " * 200}], "truncate_prompt_tokens": 30}

    assert len(parse_chat(body, model, unknown_fields="reject").prompts[0].token_ids) == 30


def test_bad_words_are_found_at_the_start_of_a_text_and_behind_a_space(model: ServedModel) -> None:
    encode = model.tokenizer.encode
    words = completion(model, bad_words=["sea", "deep water"]).params[0].bad_word_ids

    assert tuple(encode("sea", add_special_tokens=False)) in words
    spaced = tuple(encode(" sea", add_special_tokens=False))
    assert spaced in words or len(spaced) != len(encode("sea", add_special_tokens=False))


def test_bad_words_may_not_forbid_all_allowed_tokens(model: ServedModel) -> None:
    (token_id,) = model.tokenizer.encode("a", add_special_tokens=False)

    with pytest.raises(InvalidRequest) as caught:
        completion(model, allowed_token_ids=[token_id], bad_words=["a"])

    assert (caught.value.code, caught.value.param) == ("conflict_fields", "allowed_token_ids")


@pytest.mark.parametrize(
    ("fields", "num_top"),
    [
        ({}, None),
        ({"logprobs": 3}, None),
        ({"echo": True}, None),
        ({"echo": True, "logprobs": 3}, 3),
        ({"prompt_logprobs": 0}, 0),
        ({"prompt_logprobs": 5, "echo": True, "logprobs": 2}, 5),
        ({"prompt_logprobs": -1}, 2560),
    ],
)
def test_the_engine_computes_the_most_alternatives_that_are_told(
    model: ServedModel, fields: dict[str, Any], num_top: int | None
) -> None:
    assert completion(model, **fields).params[0].prompt_logprobs == num_top


def test_an_echo_with_logprobs_begins_with_null_and_its_offsets_cover_the_text(model: ServedModel) -> None:
    call = completion(model, echo=True, logprobs=1)
    ids = call.prompts[0].token_ids
    writer = writer_for(call, "r", model)

    (choice,) = writer.answer([pieces(call, scores=prompt_scores(len(ids)))])["choices"]

    told = choice["logprobs"]
    assert choice["text"] == "The sea is deep x"
    assert told["token_logprobs"] == [None, *(-1.0 - i for i in range(len(ids) - 1)), -0.125]
    assert told["top_logprobs"][0] is None
    assert all(-0.25 in best.values() and -0.5 not in best.values() for best in told["top_logprobs"][1:-1])
    ends = [*told["text_offset"][1:], len(choice["text"])]
    texts = [choice["text"][lo:hi] for lo, hi in zip(told["text_offset"], ends, strict=True)]
    assert "".join(texts) == choice["text"]
    assert texts[-1] == " x"


def test_a_streamed_echo_tells_the_same_logprobs_as_a_whole_answer(model: ServedModel) -> None:
    call = completion(model, echo=True, logprobs=1, stream=True)
    parts = pieces(call, scores=prompt_scores(len(call.prompts[0].token_ids)))
    (whole,) = writer_for(call, "r", model).answer([parts])["choices"]

    writer = writer_for(call, "r", model)
    chunks = [chunk["choices"][0] for piece in parts for chunk in writer.chunks(0, piece)]

    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    told = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    assert {name: [value for part in told for value in part[name]] for name in told[0]} == whole["logprobs"]


def test_max_tokens_0_with_echo_scores_the_prompt_and_tells_no_token(model: ServedModel) -> None:
    call = completion(model, echo=True, logprobs=0, max_tokens=0)
    ids = call.prompts[0].token_ids

    answer = writer_for(call, "r", model).answer([pieces(call, scores=prompt_scores(len(ids)))])

    assert call.params[0].max_tokens == 1
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("The sea is deep", "length")
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_have_rank_and_text_of_the_token_and_of_the_best(model: ServedModel) -> None:
    call = completion(model, prompt_logprobs=1)
    ids = call.prompts[0].token_ids
    name = model.tokenizer.token_text

    (choice,) = writer_for(call, "r", model).answer([pieces(call, scores=prompt_scores(len(ids)))])["choices"]

    first, second, *_ = choice["prompt_logprobs"]
    assert first is None
    assert second == {
        str(ids[1]): {"logprob": -1.0, "rank": 2, "decoded_token": name(ids[1])},
        "7": {"logprob": -0.25, "rank": 1, "decoded_token": name(7)},
    }
    assert len(choice["prompt_logprobs"]) == len(ids)


def test_chat_tells_prompt_logprobs_beside_the_choices(model: ServedModel) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "prompt_logprobs": 0}
    call = parse_chat(body, model, unknown_fields="reject")
    ids = call.prompts[0].token_ids

    answer = writer_for(call, "r", model).answer([pieces(call, scores=prompt_scores(len(ids)))])

    assert len(answer["prompt_logprobs"]) == len(ids)
    assert answer["prompt_logprobs"][0] is None


def test_lost_prompt_logprobs_are_an_error_not_an_answer_without_them(model: ServedModel) -> None:
    call = completion(model, prompt_logprobs=1)

    with pytest.raises(StreamFailed, match="lost"):
        writer_for(call, "r", model).answer([pieces(call, scores=None)])
