"""Hand-offs between two real engines: exact in every state of the last block, with n > 1, after refusals and losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engines.kv_region import KVTensor
from engines.messages import Arrived, Drop, EngineMessage, Stepped
from tests.cluster import TINY_CHAT
from tests.contract.transport_helpers import PROTOCOLS
from tests.engine_pair import EnginePair

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]
HELLO = PROMPTS[0]


@pytest.fixture(params=PROTOCOLS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EnginePair]:
    pair = EnginePair(tmp_path, TINY_CHAT, protocol=request.param)
    yield pair
    pair.close()


def _region(pair: EnginePair, role: str) -> KVTensor:
    region: KVTensor = pair.halves[role].engine.core._runner._region
    return region


def _run(pair: EnginePair, *rids: str, n: int = 1) -> None:
    keys = {(rid, c) for rid in rids for c in range(n)}
    pair.run(lambda: keys <= pair.decode.finished.keys() | pair.prefill.finished.keys())


def _tail(pair: EnginePair) -> torch.Tensor:
    """KV behind the last token of HELLO, in the block that arrived."""
    (arrival,) = pair.decode.engine.core._reader._arrivals.values()
    return _region(pair, "decode").kv[arrival.blocks[0], :, :, :, len(HELLO["prompt_ids"]) :].clone()


def test_a_poisoned_block_tail_never_leaves_the_prefill_worker(pair: EnginePair) -> None:
    """Free blocks hold NaN, as the KV of a former sequence might; the tail of the last block must arrive as zeros."""
    tails: list[torch.Tensor] = []

    def look(_: Arrived) -> bool:
        tails.append(_tail(pair))
        return True

    pair.on_arrived = look
    for role in ("prefill", "decode"):
        _region(pair, role).kv.fill_(float("nan"))

    pair.add("r", HELLO["prompt_ids"])
    _run(pair, "r")

    assert [bool((tail == 0).all()) for tail in tails] == [True]
    assert pair.output("r") == HELLO["completion_ids"]


def test_a_transfer_whose_tail_was_not_zeroed_is_seen_by_the_test(pair: EnginePair) -> None:
    """The test above can fail: without `zero_tail` the poison arrives."""
    pair.prefill.engine.core._runner.zero_tail = lambda *_: None  # type: ignore[method-assign]
    _region(pair, "prefill").kv.fill_(float("nan"))
    pair.on_arrived = lambda _: False

    pair.add("r", HELLO["prompt_ids"])
    pair.run(lambda: bool(pair.decode.engine.core._reader._arrivals))

    assert _tail(pair).isnan().any()


def test_the_first_decode_step_of_a_sequence_is_told_once_with_its_stamps_in_order(pair: EnginePair) -> None:
    told: list[Stepped] = []
    take = pair.decode.take

    def take_steps() -> list[EngineMessage]:
        fresh = take()
        told.extend(message for message in fresh if isinstance(message, Stepped))
        return fresh

    vars(pair.decode)["take"] = take_steps
    for i, rid in enumerate(("a", "b")):
        pair.add(rid, PROMPTS[i]["prompt_ids"])
    _run(pair, "a", "b")

    assert sorted(message.rid for message in told) == ["a", "b"]
    for message in told:
        assert message.computed_s is not None, "both engines are on this host"
        assert message.computed_s < message.verified_s < message.began_s < message.ended_s
    assert pair.decode.engine.core._reader._joining == {}


def test_prompts_of_every_length_around_a_block_are_exact(pair: EnginePair) -> None:
    chosen = sorted(PROMPTS[:-3], key=lambda prompt: len(prompt["prompt_ids"]))[::6]
    for i, prompt in enumerate(chosen):
        pair.add(f"r{i}", prompt["prompt_ids"], max_tokens=64)

    _run(pair, *(f"r{i}" for i in range(len(chosen))))

    assert [pair.output(f"r{i}") for i in range(len(chosen))] == [p["completion_ids"] for p in chosen]
    pair.run(lambda: not pair.blocks_in_use())


@pytest.mark.parametrize("num_prompt_tokens", [10, 31, 32, 33, 64])
def test_choices_of_one_prompt_share_it_and_each_goes_its_own_way(pair: EnginePair, num_prompt_tokens: int) -> None:
    prompt = PROMPTS[40]["prompt_ids"][:num_prompt_tokens]
    pair.add("many", prompt, n=3, temperature=1.0, ignore_eos=True)
    _run(pair, "many", n=3)
    for c in range(3):
        assert len(pair.output("many", c)) == 16
    half = [pair.output("many", c)[:k] for c, k in enumerate((0, 5, 11))]

    pair.add("again", prompt, choices=half, n=3, temperature=1.0, ignore_eos=True)
    _run(pair, "again", n=3)

    for c in range(3):  # a recovered choice goes on with the very same tokens
        assert half[c] + pair.output("again", c) == pair.output("many", c)
    pair.run(lambda: not pair.blocks_in_use())


def test_a_recovered_sequence_goes_on_where_its_log_ends(pair: EnginePair) -> None:
    whole = HELLO["completion_ids"]
    for k in range(1, len(whole) - 1):
        pair.add(f"r{k}", HELLO["prompt_ids"], choices=[whole[:k]])
    _run(pair, *(f"r{k}" for k in range(1, len(whole) - 1)))

    for k in range(1, len(whole) - 1):
        assert whole[:k] + pair.output(f"r{k}") == whole


def test_a_refused_handoff_gives_all_blocks_back(pair: EnginePair) -> None:
    def refuse(message: Arrived) -> bool:
        pair.decode.engine.core.handle(Drop(message.rid, message.xfer))
        return False

    pair.on_arrived = refuse
    pair.add("r", HELLO["prompt_ids"])

    pair.run(lambda: bool(pair.prefill.tokens) and not pair.blocks_in_use())


def test_a_request_dropped_at_any_moment_leaves_nothing_behind(pair: EnginePair) -> None:
    long_prompt = next(p for p in PROMPTS if len(p["prompt_ids"]) > 900)["prompt_ids"]
    for num_turns in (0, 1, 2, 3, 5, 8):
        rid = f"r{num_turns}"
        pair.add(rid, long_prompt)
        for _ in range(num_turns):
            pair.turn()
        for half in pair.halves.values():
            half.engine.core.handle(Drop(rid))
        pair.run(lambda: not pair.blocks_in_use())
        pair.decode.engine.core._pool.check_invariants()
        pair.prefill.engine.core._pool.check_invariants()


def test_full_decode_pools_make_prompts_wait_and_all_get_through(tmp_path: Path) -> None:
    pair = EnginePair(tmp_path, TINY_CHAT, decode_blocks=128)
    try:
        chosen = [p for p in PROMPTS if 300 < len(p["prompt_ids"]) < 1200]
        for i, prompt in enumerate(chosen):
            pair.add(f"r{i}", prompt["prompt_ids"], max_tokens=64)

        _run(pair, *(f"r{i}" for i in range(len(chosen))))

        assert [pair.output(f"r{i}") for i in range(len(chosen))] == [p["completion_ids"] for p in chosen]
        pair.run(lambda: not pair.blocks_in_use())
    finally:
        pair.close()
