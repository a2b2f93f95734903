"""Prompt logprobs, allowed tokens and bad words through a whole cluster, against transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch

from tests.checkpoints import reference_model
from tests.cluster import TINY_CHAT, running_cluster

PROMPTS = [json.loads(line)["prompt_ids"] for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()[:6]]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with running_cluster(tmp_path_factory.mktemp("prompt-fields"), "--dtype", "float32") as cluster:
        yield openai.OpenAI(base_url=cluster.url + "/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """Logprobs of all next tokens, per prompt."""
    model = reference_model(TINY_CHAT)
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0].log_softmax(-1) for ids in PROMPTS]


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.completions.create(**{"model": "tiny-chat", "temperature": 0, "max_tokens": 4, **fields})


def chosen(expected: torch.Tensor, ids: list[int]) -> list[float]:
    return expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_an_echo_with_logprobs_scores_the_prompt(
    client: openai.OpenAI, expected: list[torch.Tensor], max_tokens: int
) -> None:
    create(client, prompt=PROMPTS)  # fills the prefix caches, which must not be used

    answer = create(client, prompt=PROMPTS, echo=True, logprobs=2, max_tokens=max_tokens)

    for ids, choice, scores in zip(PROMPTS, answer.choices, expected, strict=True):
        told = choice.logprobs
        assert len(told.tokens) == len(ids) if max_tokens == 0 else len(told.tokens) > len(ids)
        assert told.token_logprobs[0] is None
        assert told.token_logprobs[1 : len(ids)] == pytest.approx(chosen(scores, ids), abs=1e-3)
    if max_tokens == 0:
        assert answer.usage.completion_tokens == 0
        assert {choice.finish_reason for choice in answer.choices} == {"length"}


def test_streamed_echoes_of_several_choices_carry_the_same_logprobs(client: openai.OpenAI) -> None:
    fields = {"prompt": PROMPTS[0], "echo": True, "logprobs": 1, "n": 3}
    whole = create(client, **fields)
    values: dict[int, list[float | None]] = {0: [], 1: [], 2: []}
    for chunk in create(client, **fields, stream=True):
        for choice in chunk.choices:
            if choice.logprobs:
                values[choice.index] += choice.logprobs.token_logprobs

    for choice in whole.choices:
        assert values[choice.index] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)


def test_prompt_logprobs_are_right_while_others_share_the_steps(
    client: openai.OpenAI, expected: list[torch.Tensor]
) -> None:
    def scored(i: int) -> Any:
        return create(client, prompt=PROMPTS[i], extra_body={"prompt_logprobs": 3}).choices[0]

    with ThreadPoolExecutor(12) as pool:
        plain = [pool.submit(create, client, prompt=ids) for ids in PROMPTS]
        found = [job.result() for job in [pool.submit(scored, i) for i in range(len(PROMPTS))]]
        texts = [job.result().choices[0].text for job in plain]

    for ids, choice, scores, text in zip(PROMPTS, found, expected, texts, strict=True):
        told = choice.prompt_logprobs
        assert told[0] is None
        assert [entry[str(i)]["logprob"] for entry, i in zip(told[1:], ids[1:], strict=True)] == pytest.approx(
            chosen(scores, ids), abs=1e-3
        )
        assert all(3 <= len(entry) <= 4 for entry in told[1:])
        assert choice.text == text


def test_only_allowed_tokens_come_and_bad_words_never(client: openai.OpenAI) -> None:
    ids = create(client, prompt=PROMPTS[0], extra_body={"return_token_ids": True}).choices[0].token_ids
    first = create(client, prompt=PROMPTS[0]).choices[0].text

    body = {"allowed_token_ids": [40, 41, 42], "return_token_ids": True, "ignore_eos": True}
    allowed = create(client, prompt=PROMPTS[0], max_tokens=12, extra_body=body).choices[0].token_ids
    without = create(client, prompt=PROMPTS[0], extra_body={"bad_words": [first.split()[0]]}).choices[0].text

    assert set(allowed) <= {40, 41, 42}
    assert not set(ids) <= {40, 41, 42}
    assert not without.lstrip().startswith(first.split()[0])
