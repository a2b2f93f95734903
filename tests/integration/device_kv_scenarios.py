"""What engines do with KV on a device beside handing it over: tiers, prefixes between workers, swap. For each way."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from engines.messages import Peers, Target
from tests.engine_pair import EnginePair

MakePair = Callable[..., EnginePair]
Settle = Callable[[EnginePair], None]  # all that was under way is over, and everything is back


def evicted_prefixes_come_back(
    make_pair: MakePair, flags: dict[str, str], plain: dict[str, str], settle: Settle
) -> None:
    """From host memory and disk. `flags` are of the device's KV, `plain` of KV that peers can map."""
    small = {"model.max_model_len": "512", "kv.num_blocks": "16"}
    tiers = {"kv.host_cache_bytes": "32MiB", "kv.disk_cache_bytes": "64MiB"}
    prompts = {name: random.Random(name).choices(range(3, 500), k=300) for name in "abc"}

    def answers(pair: EnginePair, round_: str) -> dict[str, list[int]]:
        found = {}
        for name, prompt in prompts.items():
            rid = name + round_
            pair.add(rid, prompt, max_tokens=12, ignore_eos=True)
            pair.run(lambda rid=rid: (rid, 0) in pair.decode.finished)  # type: ignore[misc]
            found[name] = pair.output(rid)
        settle(pair)
        return found

    expected = answers(make_pair(flags={**small, **plain, "kv.enable_prefix_caching": "false"}), "0")
    pair = make_pair(flags={**small, **tiers, **flags})
    assert answers(pair, "1") == expected
    assert answers(pair, "2") == expected
    counters = pair.prefill.engine.core.stats().counters
    assert counters["tier_spilled_blocks"] > 0
    assert counters["tier_restored_blocks"] > 0
    assert counters["tier_damaged_blocks"] == 0


def prefixes_are_written_back_and_fetched(make_pair: MakePair, flags: dict[str, str], settle: Settle) -> None:
    """Between three devices."""
    prompt = random.Random(5).choices(range(3, 500), k=300)
    trio = make_pair(flags=flags, more=("prefill2",))
    caches = {name: Target(name, half.engine.address) for name, half in trio.halves.items() if name != "decode"}
    for name, half in trio.halves.items():
        others = [target for other, target in caches.items() if other != name]
        half.engine.core.handle(Peers([] if name == "decode" else [trio.target], others))

    trio.add("a", prompt, max_tokens=100, ignore_eos=True)
    trio.run(lambda: ("a", 0) in trio.decode.finished)
    settle(trio)
    assert trio.prefill.engine.core.stats().counters["prefix_kept_blocks"] == 3
    turn = [*prompt, *trio.output("a"), *random.Random(6).choices(range(3, 500), k=20)]
    trio.add("b", turn, max_tokens=20, ignore_eos=True)
    trio.add("plain", turn, to="prefill2", max_tokens=20, ignore_eos=True)
    trio.run(lambda: {("b", 0), ("plain", 0)} <= trio.decode.finished.keys())

    assert trio.output("b") == trio.output("plain")
    assert trio.prefill.engine.core.stats().counters["prefix_hit_tokens"] >= 12 * 32
    settle(trio)


def swapped_sequences_come_back(
    make_pair: MakePair, flags: dict[str, str], settle: Settle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.handoff_writer.PATIENCE_S", 120.0)
    context = {"model.max_model_len": "256"}

    def outputs(pair: EnginePair) -> list[list[int]]:
        for i in range(3):
            prompt = random.Random(i).choices(range(300, 2000), k=(20, 50)[i % 2])
            pair.add(f"r{i}", prompt, max_tokens=120, ignore_eos=True)
        pair.run(lambda: len(pair.decode.finished) == 3, timeout_s=100)
        settle(pair)
        return [pair.output(f"r{i}") for i in range(3)]

    expected = outputs(make_pair(flags=context))
    pair = make_pair(flags={**context, **flags, "kv.swap_bytes": "16MiB"}, decode_blocks=9)
    assert outputs(pair) == expected
    assert pair.decode.engine.core.stats().counters["preempt_swap_blocks"] > 0
