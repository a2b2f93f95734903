"""Requests that no gateway would let through: each is refused by name, and nobody else's tokens change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from engines.messages import Add, Drop, Failed
from engines.params import SamplingParams
from engines.structured.constraint import Constraint
from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]
NEIGHBOURS = {f"good{i}": PROMPTS[i] for i in range(4)}
VOCAB = 2560
NUM_BLOCKS = 40
NAN = float("nan")


@dataclass(frozen=True)
class Bad:
    """An `Add` as `params` and `fields` make it out of a good one, the code and a word of the refusal."""

    code: str
    word: str
    fields: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


BAD = {
    "empty prompt": Bad("invalid_value", "no tokens", {"prompt_ids": []}),
    "no choices": Bad("invalid_value", "no choices", {"choices": []}),
    "unknown token id": Bad("invalid_value", f"token 2 of the prompt is {VOCAB}", {"prompt_ids": [5, 6, VOCAB, 7]}),
    "negative token id": Bad("invalid_value", "token 0 of the prompt is -1", {"prompt_ids": [-1]}),
    "unknown output id": Bad("invalid_value", "choice 0", {"choices": [[5, 999_999]]}),
    "longer than the context": Bad("context_length_exceeded", "context", {"prompt_ids": [5] * 1_000_000}),
    "more blocks than exist": Bad("context_length_exceeded", "context", {"prompt_ids": [5] * (NUM_BLOCKS * 32 + 1)}),
    "seed of 200 bits": Bad("invalid_value", "seed", {"seed": 2**200}),
    "max_tokens 0": Bad("invalid_value", "max_tokens is 0", params={"max_tokens": 0}),
    "n 0": Bad("invalid_value", "n is 0", params={"n": 0}),
    "temperature NaN": Bad("invalid_value", "temperature is nan", params={"temperature": NAN}),
    "temperature below 0": Bad("invalid_value", "temperature is -1", params={"temperature": -1.0}),
    "top_p 0": Bad("invalid_value", "top_p is 0", params={"top_p": 0.0}),
    "top_k below 0": Bad("invalid_value", "top_k is -5", params={"top_k": -5}),
    "min_p 2": Bad("invalid_value", "min_p is 2", params={"min_p": 2.0}),
    "repetition_penalty 0": Bad("invalid_value", "repetition_penalty is 0", params={"repetition_penalty": 0.0}),
    "presence_penalty inf": Bad("invalid_value", "presence_penalty", params={"presence_penalty": float("inf")}),
    "bias NaN": Bad("invalid_value", "logit_bias of token 7", params={"logit_bias": {7: NAN}}),
    "logprobs below 0": Bad("invalid_value", "logprobs is -1", params={"logprobs": -1}),
    "broken regex": Bad("invalid_value", "compiled", params={"constraint": Constraint("regex", "a(")}),
    "broken grammar": Bad("invalid_value", "compiled", params={"constraint": Constraint("lark", "start: nowhere")}),
    "schema that nothing matches": Bad(
        "invalid_value", "compiled", params={"constraint": Constraint("json", '{"type": "object", "allOf": [false]}')}
    ),
}
ODD_BUT_GOOD = {
    "seed of 64 bits": {"seed": 2**64 - 1},
    "negative seed": {"seed": -7},
}
ODD_PARAMS_BUT_GOOD = {
    "stop ids beyond the vocabulary": {"stop_token_ids": (999_999, -3)},
    "bias beyond the vocabulary": {"logit_bias": {999_999: 5.0}},
    "an empty stop string": {"stop": ("",)},
}


def _add(rid: str, fields: dict[str, Any], params: dict[str, Any]) -> Add:
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})
    common: dict[str, Any] = {"prompt_ids": PROMPTS[9]["prompt_ids"], "choices": [[]], "seed": 7, **fields}
    return Add(rid=rid, epoch=2, token=f"t.{rid}", mode="push", params=sampling, **common)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[EnginePair]:
    flags = {"kv.num_blocks": str(NUM_BLOCKS), "model.max_model_len": str(NUM_BLOCKS * 32)}
    pair = EnginePair(tmp_path, TINY_CHAT, flags=flags)
    yield pair
    pair.close()


@pytest.fixture
def failures(pair: EnginePair, monkeypatch: pytest.MonkeyPatch) -> dict[str, Failed]:
    """What either engine gave up, by request."""
    found: dict[str, Failed] = {}
    for half in pair.halves.values():
        take = half.take

        def taken(take: Any = take) -> list[Any]:
            fresh: list[Any] = take()
            found.update({said.rid: said for said in fresh if isinstance(said, Failed)})
            return fresh

        monkeypatch.setattr(half, "take", taken)
    return found


def test_each_bad_request_is_refused_by_name_and_no_neighbour_notices(
    pair: EnginePair, failures: dict[str, Failed]
) -> None:
    for rid, row in NEIGHBOURS.items():
        pair.add(rid, row["prompt_ids"], max_tokens=32)
    for name, bad in BAD.items():
        # One after another, while the neighbours run in the same steps.
        pair.prefill.engine.core.handle(_add(name, bad.fields | {"targets": [pair.target]}, bad.params))
        pair.turn()
    pair.run(lambda: len(failures) == len(BAD) and len(pair.decode.finished) == len(NEIGHBOURS))

    told = {name: (failed.code, failed.is_retryable) for name, failed in failures.items()}
    assert told == {name: (bad.code, False) for name, bad in BAD.items()}
    assert [name for name, bad in BAD.items() if bad.word not in failures[name].message] == []
    assert {rid: pair.output(rid) for rid in NEIGHBOURS} == {
        rid: row["completion_ids"][:32] for rid, row in NEIGHBOURS.items()
    }
    assert pair.blocks_in_use() == {}


def test_a_decode_engine_refuses_what_comes_to_it_directly_too(pair: EnginePair, failures: dict[str, Failed]) -> None:
    for name in ("unknown token id", "empty prompt", "max_tokens 0", "more blocks than exist"):
        pair.decode.engine.core.handle(_add(name, BAD[name].fields, BAD[name].params))
    pair.run(lambda: len(failures) == 4)

    assert {failed.code for failed in failures.values()} == {"invalid_value", "context_length_exceeded"}
    assert pair.blocks_in_use() == {}


def test_odd_requests_that_have_a_meaning_are_served(pair: EnginePair, failures: dict[str, Failed]) -> None:
    odd = {name: _add(name, fields, {}) for name, fields in ODD_BUT_GOOD.items()}
    odd |= {name: _add(name, {}, params) for name, params in ODD_PARAMS_BUT_GOOD.items()}
    for add in odd.values():
        pair.prefill.engine.core.handle(_with_target(add, pair))
    pair.run(lambda: len(pair.decode.finished) + len(failures) == len(odd))

    assert failures == {}
    assert {name: pair.output(name) for name in odd} == dict.fromkeys(odd, PROMPTS[9]["completion_ids"][:8])


def test_stopping_what_nobody_knows_changes_nothing(pair: EnginePair, failures: dict[str, Failed]) -> None:
    pair.add("good0", NEIGHBOURS["good0"]["prompt_ids"], max_tokens=16)
    for half in pair.halves.values():
        half.engine.core.handle(Drop("nobody", ""))
    pair.run(lambda: ("good0", 0) in pair.decode.finished)

    assert pair.output("good0") == NEIGHBOURS["good0"]["completion_ids"][:16]
    assert failures == {}


def _with_target(add: Add, pair: EnginePair) -> Add:
    add.targets.append(pair.target)
    return add
