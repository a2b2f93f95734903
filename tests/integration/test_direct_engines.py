"""Engines whose KV rdma writes where it lies, on a CPU as on a GPU: same tokens, every block back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import configs
from engines.build import build_engine
from engines.device_kv.direct_node import DirectNode
from engines.errors import DeviceUnavailable
from engines.messages import Peers, Target
from engines.process import EngineConfig
from kvstore.transport.errors import RdmaError
from tests.cluster import TINY_CHAT
from tests.contract.transport_helpers import needs_nixl
from tests.engine_pair import SECRET, EnginePair
from tests.integration.test_engine_handoff import (
    test_a_poisoned_block_tail_never_leaves_the_prefill_worker,
    test_a_recovered_sequence_goes_on_where_its_log_ends,
    test_a_refused_handoff_gives_all_blocks_back,
    test_a_request_dropped_at_any_moment_leaves_nothing_behind,
    test_choices_of_one_prompt_share_it_and_each_goes_its_own_way,
    test_prompts_of_every_length_around_a_block_are_exact,
)

__all__ = [
    "test_a_poisoned_block_tail_never_leaves_the_prefill_worker",
    "test_a_recovered_sequence_goes_on_where_its_log_ends",
    "test_a_refused_handoff_gives_all_blocks_back",
    "test_a_request_dropped_at_any_moment_leaves_nothing_behind",
    "test_choices_of_one_prompt_share_it_and_each_goes_its_own_way",
    "test_prompts_of_every_length_around_a_block_are_exact",
]

pytestmark = needs_nixl
DIRECT, SHARED, BOUNCED = {"kv.direct": "on"}, {"kv.direct": "auto"}, {"kv.direct": "off", "kv.bounce_bytes": "32MiB"}
MIXES = {
    "both": (DIRECT, DIRECT),
    "prefill": (DIRECT, SHARED),
    "decode": (SHARED, DIRECT),
    "prefill, decode bounced": (DIRECT, BOUNCED),
}
MakePair = Callable[..., EnginePair]


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[MakePair]:
    made: list[EnginePair] = []

    def make(**options: Any) -> EnginePair:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(EnginePair(folder, TINY_CHAT, protocol="rdma", **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture(params=MIXES)
def pair(request: pytest.FixtureRequest, make_pair: MakePair) -> Iterator[EnginePair]:
    prefill, decode = MIXES[request.param]
    pair = make_pair(flags=prefill, decode_flags=decode)
    kinds = [isinstance(half.engine.node, DirectNode) for half in (pair.prefill, pair.decode)]
    assert kinds == [flags is DIRECT for flags in (prefill, decode)]
    yield pair
    pair.run(lambda: not pair.blocks_in_use())
    for half in pair.halves.values():
        half.engine.node.check_invariants()


def test_a_dry_run_proves_a_pair_over_device_addresses(pair: EnginePair) -> None:
    pair.prefill.engine.core.handle(Peers([pair.target], []))
    dry_runs = pair.prefill.engine.core._dry_runs
    pair.run(lambda: all(known.is_proven for known in dry_runs._pairs.values()))
    assert dry_runs.usable == [pair.target]


def test_an_evicted_prefix_comes_back_from_host_memory_and_disk(make_pair: MakePair) -> None:
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
        pair.run(lambda: not pair.blocks_in_use())
        return found

    expected = answers(make_pair(flags={**small, "kv.enable_prefix_caching": "false"}), "0")
    pair = make_pair(flags={**small, **tiers, **DIRECT})
    assert answers(pair, "1") == expected
    assert answers(pair, "2") == expected
    counters = pair.prefill.engine.core.stats().counters
    assert counters["tier_spilled_blocks"] > 0
    assert counters["tier_restored_blocks"] > 0
    assert counters["tier_damaged_blocks"] == 0


def test_prefixes_are_written_back_and_fetched_between_devices(make_pair: MakePair) -> None:
    prompt = random.Random(5).choices(range(3, 500), k=300)
    trio = make_pair(flags=DIRECT, more=("prefill2",))
    caches = {name: Target(name, half.engine.address) for name, half in trio.halves.items() if name != "decode"}
    for name, half in trio.halves.items():
        others = [target for other, target in caches.items() if other != name]
        half.engine.core.handle(Peers([] if name == "decode" else [trio.target], others))

    trio.add("a", prompt, max_tokens=100, ignore_eos=True)
    trio.run(lambda: ("a", 0) in trio.decode.finished)
    trio.run(lambda: not trio.blocks_in_use())
    assert trio.prefill.engine.core.stats().counters["prefix_kept_blocks"] == 3
    turn = [*prompt, *trio.output("a"), *random.Random(6).choices(range(3, 500), k=20)]
    trio.add("b", turn, max_tokens=20, ignore_eos=True)
    trio.add("plain", turn, to="prefill2", max_tokens=20, ignore_eos=True)
    trio.run(lambda: {("b", 0), ("plain", 0)} <= trio.decode.finished.keys())

    assert trio.output("b") == trio.output("plain")
    assert trio.prefill.engine.core.stats().counters["prefix_hit_tokens"] >= 12 * 32
    trio.run(lambda: not trio.blocks_in_use())


def test_swapped_sequences_come_back_to_the_device_exactly(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.handoff_writer.PATIENCE_S", 120.0)
    context = {"model.max_model_len": "256"}

    def outputs(pair: EnginePair) -> list[list[int]]:
        for i in range(3):
            prompt = random.Random(i).choices(range(300, 2000), k=(20, 50)[i % 2])
            pair.add(f"r{i}", prompt, max_tokens=120, ignore_eos=True)
        pair.run(lambda: len(pair.decode.finished) == 3, timeout_s=100)
        return [pair.output(f"r{i}") for i in range(3)]

    expected = outputs(make_pair(flags=context))
    pair = make_pair(flags={**context, **DIRECT, "kv.swap_bytes": "16MiB"}, decode_blocks=9)
    assert outputs(pair) == expected
    assert pair.decode.engine.core.stats().counters["preempt_swap_blocks"] > 0


def test_workers_with_blocks_of_another_size_refuse_each_other_by_name(make_pair: MakePair) -> None:
    """Conversions over rdma are refused, whatever the memory."""
    pair = make_pair(flags={**DIRECT, "kv.block_size": "16"}, decode_flags={"kv.block_size": "32"})
    pair.prefill.engine.core.handle(Peers([pair.target], []))
    dry_runs = pair.prefill.engine.core._dry_runs
    pair.run(lambda: any(known.fault for known in dry_runs._pairs.values()))
    (known,) = dry_runs._pairs.values()
    assert known.fault.startswith("no_rdma")


def _config(folder: Path, **flags: str) -> EngineConfig:
    settings = configs.load(env={}, flags={"model.path": str(TINY_CHAT), "run_dir": str(folder), **flags})
    return EngineConfig(settings=settings, role="prefill", node="p", incarnation="p-1", secret=SECRET)


def test_without_nixl_direct_kv_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.transport.rdma.nixl_version", lambda: "")
    config = _config(tmp_path, **{"transfer.protocol": "rdma", "model.max_model_len": "256", **DIRECT})
    with pytest.raises(RdmaError, match="nixl-cu12 is not installed"):
        build_engine(config, lambda _: None)


def test_a_worker_told_to_have_ranks_by_its_command_line_refuses_direct_kv(tmp_path: Path) -> None:
    config = _config(tmp_path, **{"transfer.protocol": "rdma", "model.max_model_len": "256", **DIRECT})
    config.settings.prefill.tensor_parallel_size = 2
    with pytest.raises(DeviceUnavailable, match=r"kv.direct with tensor_parallel_size=2"):
        build_engine(config, lambda _: None)
