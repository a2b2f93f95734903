"""Prompt logprobs of real engines over a hand-off: with the first token of each choice, and after a recovery."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.messages import TokenOut
from kvstore.state.entries import PromptLogprobs
from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair, Half

PROMPT = json.loads((TINY_CHAT / "prompts.jsonl").read_text().splitlines()[40])["prompt_ids"]


class Listening(EnginePair):
    """Keeps what each choice was told of its prompt, with the position it came at."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, TINY_CHAT)
        self.scores: dict[tuple[str, int], list[tuple[int, PromptLogprobs]]] = {}
        for half in self.halves.values():
            self._listen(half)

    def _listen(self, half: Half) -> None:
        put = half._put

        def listen(out: TokenOut) -> None:
            if out.prompt_logprobs is not None:
                self.scores.setdefault((out.rid, out.c), []).append((out.index, out.prompt_logprobs))
            put(out)

        half._put = listen  # type: ignore[method-assign]

    def finish(self, rid: str, n: int) -> None:
        keys = {(rid, c) for c in range(n)}
        self.run(lambda: keys <= self.decode.finished.keys() | self.prefill.finished.keys())


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Listening]:
    pair = Listening(tmp_path)
    yield pair
    pair.close()


def test_every_choice_has_them_once_and_with_its_first_token(pair: Listening) -> None:
    pair.add("r", PROMPT, n=3, temperature=1.0, ignore_eos=True, prompt_logprobs=2)
    pair.finish("r", 3)

    ((index, scores),) = pair.scores["r", 0]
    assert index == 0
    assert len(scores.ranks) == 4 * (len(PROMPT) - 1)
    assert pair.scores == {("r", c): [(0, scores)] for c in range(3)}


def test_a_recovered_choice_without_a_token_gets_them_and_the_same_text(pair: Listening) -> None:
    params = {"n": 3, "temperature": 1.0, "ignore_eos": True, "prompt_logprobs": 2}
    pair.add("whole", PROMPT, **params)
    pair.finish("whole", 3)
    known = [pair.output("whole", c)[:k] for c, k in enumerate((0, 5, 0))]

    pair.add("again", PROMPT, choices=known, **params)
    pair.finish("again", 3)

    ((_, scores),) = pair.scores["whole", 0]
    assert {key: told for key, told in pair.scores.items() if key[0] == "again"} == {
        ("again", 0): [(0, scores)],
        ("again", 2): [(0, scores)],
    }
    for c in range(3):
        assert known[c] + pair.output("again", c) == pair.output("whole", c)
    pair.run(lambda: not pair.blocks_in_use())
