"""Engines whose KV rdma writes where it lies, on a CPU as on a GPU: same tokens, every block back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import configs
from engines.build import build_engine
from engines.device_kv.direct_node import DirectNode
from engines.errors import DeviceUnavailable
from engines.messages import Peers
from engines.process import EngineConfig
from kvstore.transport.errors import RdmaError
from tests.cluster import TINY_CHAT
from tests.contract.transport_helpers import needs_nixl
from tests.engine_pair import SECRET, EnginePair
from tests.integration.device_kv_scenarios import (
    MakePair,
    evicted_prefixes_come_back,
    prefixes_are_written_back_and_fetched,
    swapped_sequences_come_back,
)
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


def settle(pair: EnginePair) -> None:
    pair.run(lambda: not pair.blocks_in_use())


def test_an_evicted_prefix_comes_back_from_host_memory_and_disk(make_pair: MakePair) -> None:
    evicted_prefixes_come_back(make_pair, DIRECT, SHARED, settle)


def test_prefixes_are_written_back_and_fetched_between_devices(make_pair: MakePair) -> None:
    prefixes_are_written_back_and_fetched(make_pair, DIRECT, settle)


def test_swapped_sequences_come_back_to_the_device_exactly(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    swapped_sequences_come_back(make_pair, DIRECT, settle, monkeypatch)


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
