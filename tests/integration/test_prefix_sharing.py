"""Prefixes between workers: written back by a decode worker, fetched from a peer; always token-exact."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.messages import Peers, PrefixHint, Target
from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair

BLOCK = 32
NUM_TOKENS = 100
PROMPT = random.Random(5).choices(range(3, 500), k=300)
NEXT_WORDS = random.Random(6).choices(range(3, 500), k=20)


@pytest.fixture(params=["shm", "tcp"])
def trio(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EnginePair]:
    """Two prefill workers and a decode worker that all know each other."""
    trio = EnginePair(tmp_path, TINY_CHAT, protocol=request.param, more=("prefill2",))
    caches = {name: Target(name, half.engine.address) for name, half in trio.halves.items() if name != "decode"}
    for name, half in trio.halves.items():
        others = [target for other, target in caches.items() if other != name]
        half.engine.core.handle(Peers([] if name == "decode" else [trio.target], others))
    yield trio
    trio.close()


def finish(trio: EnginePair, rid: str) -> list[int]:
    trio.run(lambda: (rid, 0) in trio.decode.finished)
    return trio.output(rid)


def counter(trio: EnginePair, half: str, name: str) -> float:
    return trio.halves[half].engine.core.stats().counters[name]


def settled(trio: EnginePair) -> None:
    """Nothing is under way any more."""
    trio.run(lambda: trio.blocks_in_use() == {})


def test_the_next_turn_finds_what_the_last_one_generated(trio: EnginePair) -> None:
    trio.add("a", PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    answer = finish(trio, "a")
    settled(trio)
    # 300 + 99 tokens have KV: 12 blocks, of which the prefill worker had computed 9.
    assert counter(trio, "prefill", "prefix_kept_blocks") == 3
    turn = [*PROMPT, *answer, *NEXT_WORDS]
    before = counter(trio, "prefill", "prefix_hit_tokens")
    trio.add("b", turn, max_tokens=20, ignore_eos=True)
    second = finish(trio, "b")
    assert counter(trio, "prefill", "prefix_hit_tokens") - before == 12 * BLOCK

    trio.add("plain", turn, to="prefill2", max_tokens=20, ignore_eos=True)
    assert counter(trio, "prefill2", "prefix_hit_tokens") == 0
    assert finish(trio, "plain") == second
    settled(trio)


def test_a_long_answer_is_written_back_while_it_grows(trio: EnginePair) -> None:
    trio.add("a", PROMPT, max_tokens=5000, ignore_eos=True)
    trio.run(lambda: counter(trio, "prefill", "prefix_kept_blocks") >= 8)
    assert ("a", 0) not in trio.decode.finished
    assert (counter(trio, "prefill", "prefix_kept_blocks")) % 4 == 0, "four blocks at a time"


def test_a_prefix_is_fetched_from_the_peer_that_has_it(trio: EnginePair) -> None:
    trio.add("a", PROMPT, max_tokens=5, ignore_eos=True)
    expected = finish(trio, "a")
    (key, num_blocks) = max(trio.kept, key=lambda mark: mark[1])
    assert num_blocks == 9
    assert len(key) == 16

    hint = PrefixHint(trio.prefill.engine.address, num_blocks)
    trio.add("b", PROMPT, to="prefill2", prefix=hint, max_tokens=5, ignore_eos=True)
    assert finish(trio, "b") == expected
    assert counter(trio, "prefill2", "prefix_kept_blocks") == 9
    assert counter(trio, "prefill2", "prefix_hit_tokens") == 9 * BLOCK
    settled(trio)


def test_a_hint_that_is_not_true_only_costs_a_question(trio: EnginePair) -> None:
    hint = PrefixHint(trio.prefill.engine.address, 9)
    trio.add("b", PROMPT, to="prefill2", prefix=hint, max_tokens=5, ignore_eos=True)
    answer = finish(trio, "b")
    assert counter(trio, "prefill2", "prefix_fetches_declined") == 1
    trio.add("a", PROMPT, max_tokens=5, ignore_eos=True)
    assert finish(trio, "a") == answer


def test_a_holder_that_is_gone_delays_a_prompt_by_half_a_second_at_most(trio: EnginePair) -> None:
    hint = PrefixHint(trio.prefill.engine.address, 9)
    trio.prefill.engine.node.stop()
    trio.add("b", PROMPT, to="prefill2", prefix=hint, max_tokens=5, ignore_eos=True)
    trio.halves.pop("prefill")
    finish(trio, "b")
    assert counter(trio, "prefill2", "prefix_fetches_late") == 1


def test_nobody_takes_a_prefix_when_blocks_are_short(trio: EnginePair) -> None:
    pool = trio.prefill.engine.core._pool
    trio.add("a", PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True)
    trio.run(lambda: bool(trio.decode.tokens.get(("a", 0))))
    taken = pool.allocate(pool.num_free - 2)
    finish(trio, "a")
    trio.run(lambda: counter(trio, "decode", "prefix_send_dropped") > 0)
    assert counter(trio, "prefill", "prefix_kept_blocks") == 0
    pool.free(taken)
    settled(trio)
