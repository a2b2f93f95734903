"""Engines whose KV lies apart from what peers can map, on a CPU as on a GPU: same tokens, every slot and block back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import configs
from engines.build import build_engine
from engines.device_kv.bounced_node import BouncedNode
from engines.errors import BounceTooSmall, DeviceUnavailable
from engines.messages import Arrived, Drop
from engines.process import EngineConfig
from tests.cluster import TINY_CHAT
from tests.contract.transport_helpers import PROTOCOLS
from tests.engine_pair import SECRET, EnginePair
from tests.integration.device_kv_scenarios import (
    MakePair,
    evicted_prefixes_come_back,
    prefixes_are_written_back_and_fetched,
    swapped_sequences_come_back,
)
from tests.integration.test_engine_handoff import (
    PROMPTS,
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

BOUNCE, NONE = {"kv.bounce_bytes": "32MiB"}, {"kv.bounce_bytes": "0B"}
MIXES = {"both": (BOUNCE, BOUNCE), "prefill": (BOUNCE, NONE), "decode": (NONE, BOUNCE)}


def bounced_nodes(pair: EnginePair) -> list[BouncedNode]:
    return [half.engine.node for half in pair.halves.values() if isinstance(half.engine.node, BouncedNode)]


def check_slots(pair: EnginePair) -> None:
    """All are back as soon as nothing is under way."""
    pair.run(lambda: not pair.blocks_in_use())
    for node in bounced_nodes(pair):
        node.check_invariants()
        pair.run(lambda node=node: node._slots.num_free == node._slots.num_slots)  # type: ignore[misc]


@pytest.fixture
def make_pair(tmp_path: Path) -> Iterator[MakePair]:
    made: list[EnginePair] = []

    def make(protocol: str = "shm", **options: Any) -> EnginePair:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(EnginePair(folder, TINY_CHAT, protocol=protocol, **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=MIXES)
def pair(request: pytest.FixtureRequest, protocol: str, make_pair: MakePair) -> Iterator[EnginePair]:
    prefill, decode = MIXES[request.param]
    pair = make_pair(protocol, flags=prefill, decode_flags=decode)
    assert len(bounced_nodes(pair)) == sum(flags is BOUNCE for flags in (prefill, decode))
    yield pair
    check_slots(pair)


def _run(pair: EnginePair, prompts: list[dict[str, Any]]) -> list[list[int]]:
    for i, prompt in enumerate(prompts):
        pair.add(f"r{i}", prompt["prompt_ids"], max_tokens=64)
    names = {(f"r{i}", 0) for i in range(len(prompts))}
    pair.run(lambda: names <= pair.decode.finished.keys() | pair.prefill.finished.keys(), timeout_s=90)
    return [pair.output(f"r{i}") for i in range(len(prompts))]


def test_pushes_that_wait_for_slots_and_grants_that_are_refused_for_lack_of_them_all_get_through(
    make_pair: MakePair,
) -> None:
    """Room for one of the longest sequences in each direction, and a load of many."""
    tight = {"kv.bounce_bytes": "3MiB", "model.max_model_len": "448"}
    chosen = [p for p in PROMPTS if 200 < len(p["prompt_ids"]) <= 384]
    assert len(chosen) > 4
    waits = refusals = 0.0
    for prefill, decode in ((tight, NONE), (tight, tight)):
        pair = make_pair(flags={**tight, **prefill}, decode_flags=decode)
        assert _run(pair, chosen) == [p["completion_ids"] for p in chosen]
        check_slots(pair)
        waits += pair.prefill.engine.node.counters()["bounce_waits"]
        refusals += pair.decode.engine.node.counters().get("bounce_refusals", 0.0)
    assert waits > 0
    assert refusals > 0


def test_a_request_that_is_dropped_while_its_push_waits_leaves_nothing(make_pair: MakePair) -> None:
    pair = make_pair(flags={"kv.bounce_bytes": "3MiB", "model.max_model_len": "448"}, decode_flags=NONE)
    chosen = [p for p in PROMPTS if 200 < len(p["prompt_ids"]) <= 384]
    for num_turns in range(2, 12):
        for i, prompt in enumerate(chosen):
            pair.add(f"r{num_turns}.{i}", prompt["prompt_ids"])
        for _ in range(num_turns):
            pair.turn()
        for half in pair.halves.values():
            for i in range(len(chosen)):
                half.engine.core.handle(Drop(f"r{num_turns}.{i}"))
        pair.on_arrived = _refuse(pair)
        check_slots(pair)


def _refuse(pair: EnginePair) -> Callable[[Arrived], bool]:
    def refuse(message: Arrived) -> bool:
        pair.decode.engine.core.handle(Drop(message.rid, message.xfer))
        return False

    return refuse


def test_an_evicted_prefix_spills_from_the_device_and_comes_back_from_host_memory_and_disk(make_pair: MakePair) -> None:
    evicted_prefixes_come_back(make_pair, BOUNCE, NONE, check_slots)


def test_prefixes_are_written_back_and_fetched_between_devices(make_pair: MakePair) -> None:
    prefixes_are_written_back_and_fetched(make_pair, BOUNCE, check_slots)


def test_swapped_sequences_come_back_to_the_device_exactly(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped_sequences_come_back(make_pair, BOUNCE, check_slots, monkeypatch)


def _build(folder: Path, **flags: str) -> None:
    settings = configs.load(env={}, flags={"model.path": str(TINY_CHAT), "run_dir": str(folder), **flags})
    config = EngineConfig(settings=settings, role="prefill", node="p", incarnation="p-1", secret=SECRET)
    build_engine(config, lambda _: None)


def test_a_bounce_region_that_cannot_hold_the_longest_sequence_each_way_is_refused_at_start(tmp_path: Path) -> None:
    with pytest.raises(BounceTooSmall, match=r"`kv\.bounce_bytes` is 1.0 MiB"):
        _build(tmp_path, **{"kv.bounce_bytes": "1MiB"})


def test_ranks_share_the_region_itself_so_a_bounce_region_beside_them_is_refused(tmp_path: Path) -> None:
    with pytest.raises(configs.ConfigError, match=r"kv.bounce_bytes.*prefill.tensor_parallel_size is 2"):
        _build(tmp_path, **{"kv.bounce_bytes": "64MiB", "prefill.tensor_parallel_size": "2"})


def test_a_worker_told_to_have_ranks_by_its_command_line_refuses_a_bounce_region_too(tmp_path: Path) -> None:
    flags = {"model.path": str(TINY_CHAT), "run_dir": str(tmp_path), **BOUNCE, "model.max_model_len": "256"}
    settings = configs.load(env={}, flags=flags)
    settings.prefill.tensor_parallel_size = 2
    config = EngineConfig(settings=settings, role="prefill", node="p", incarnation="p-1", secret=SECRET)
    with pytest.raises(DeviceUnavailable, match=r"kv.bounce_bytes with tensor_parallel_size=2"):
        build_engine(config, lambda _: None)
