from __future__ import annotations

from pathlib import Path

import pytest

import configs
from configs.loader import load_with_origins
from configs.unread import unread_faults

PRESETS = Path(configs.__file__).parent / "presets"
ENV = {"HOME": "/home/somebody"}


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_preset_is_valid_on_any_machine(preset: Path) -> None:
    configs.load(preset, env=ENV)


def test_vllm_preset_has_eight_prefill_and_thirty_two_decode_workers() -> None:
    settings = configs.load(PRESETS / "vllm-8p32d.yaml", env=ENV)
    prefill, decode, transfer = settings.prefill, settings.decode, settings.transfer
    assert (prefill.num_workers, prefill.hardware, prefill.max_batch_size, prefill.max_num_seqs) == (
        8,
        "H100",
        128,
        256,
    )
    assert (decode.num_workers, decode.hardware, decode.max_batch_size, decode.max_num_seqs) == (
        32,
        "A100 or A10G",
        512,
        512,
    )
    assert (transfer.protocol, transfer.gbps) == ("rdma", 100)


def test_lmdeploy_preset_has_unequal_tensor_parallel_sizes() -> None:
    settings = configs.load(PRESETS / "lmdeploy-tp8-tp4.yaml", env=ENV)
    assert (settings.prefill.tensor_parallel_size, settings.prefill.hardware) == (8, "H100")
    assert (settings.decode.tensor_parallel_size, settings.decode.hardware) == (4, "A100")


def test_what_nothing_reads_yet_is_refused_by_name() -> None:
    loaded = load_with_origins(PRESETS / "lmdeploy-tp8-tp4.yaml", env=ENV)
    paths = [fault.path for fault in unread_faults(loaded.settings, loaded.origins)]
    assert paths == ["prefill.tensor_parallel_size", "decode.tensor_parallel_size"]


def test_gpus_are_asked_for_by_name_and_one_rank_on_each_is_taken() -> None:
    loaded = load_with_origins(PRESETS / "vllm-8p32d.yaml", env=ENV)
    assert (loaded.settings.prefill.device, loaded.settings.decode.device) == ("cuda", "cuda")
    assert [fault.path for fault in unread_faults(loaded.settings, loaded.origins)] == ["decode.max_batch_size"]


def test_local_preset_asks_for_nothing_that_is_not_built() -> None:
    loaded = load_with_origins(PRESETS / "local.yaml", env=ENV)
    assert unread_faults(loaded.settings, loaded.origins) == []
