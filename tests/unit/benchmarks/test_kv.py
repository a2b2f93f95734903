from __future__ import annotations

from typing import Any

import pytest

from benchmarks.kv import summarize_rounds

NUM_BYTES = 1_000_000_000
CASES = ("contiguous", "contiguous_checked", "16k", "16k_checked")


def measured(num_rounds: int = 12, **changed: float) -> dict[str, Any]:
    """Rounds in which memmove takes 0.1 s, shm 0.125 s and tcp 0.5 s, unless said otherwise."""
    seconds = {"memcpy": 0.1, "hash": 0.05, "copy_and_hash": 0.08}
    for protocol, took in (("shm", 0.125), ("tcp", 0.5)):
        seconds |= {f"{protocol}_{case}": took for case in CASES}
        seconds |= {f"{protocol}_pairs_{n}": took for n in range(1, 5)}
    one = {"seconds": {**seconds, **changed}, "notice_s": {"shm": [100e-6] * 5, "tcp": [250e-6] * 5}}
    return {"num_bytes": NUM_BYTES, "num_small_blocks": 4096, "rounds": [one] * num_rounds}


def test_ratios_compare_with_memmove_of_the_same_round() -> None:
    _, ratios = summarize_rounds(measured())

    assert ratios["shm_contiguous_vs_memcpy"].value == pytest.approx(0.8)
    assert ratios["shm_contiguous_vs_memcpy"].verdict == "missed"
    assert ratios["shm_16k_vs_memcpy"].verdict == "reached"
    assert ratios["tcp_contiguous_vs_memcpy"].value == pytest.approx(0.2)


def test_rdma_is_named_for_what_moves_its_bytes_and_nothing_else_need_be_measured() -> None:
    seconds = {"memcpy": 0.1, "hash": 0.05, "copy_and_hash": 0.08, **{f"rdma_{case}": 0.25 for case in CASES}}
    one = {"seconds": seconds, "notice_s": {"rdma": [1e-3] * 5}}

    rows, ratios = summarize_rounds({"num_bytes": NUM_BYTES, "num_small_blocks": 4096, "rounds": [one] * 12})

    assert set(ratios) == {
        "hash_vs_memcpy",
        "copy_and_hash_vs_memcpy",
        "nixl_contiguous_vs_memcpy",
        "nixl_16k_vs_memcpy",
        "nixl_contiguous_checked_vs_unchecked",
    }
    assert ratios["nixl_contiguous_vs_memcpy"].value == pytest.approx(0.4)
    assert ratios["nixl_contiguous_vs_memcpy"].verdict == "reached"
    assert any(row["case"] == "rdma_64k_notice" for row in rows)


def test_hashing_alone_and_with_the_copy_are_compared_with_memmove_of_the_same_round() -> None:
    _, ratios = summarize_rounds(measured())

    assert ratios["hash_vs_memcpy"].value == pytest.approx(2.0)
    assert ratios["copy_and_hash_vs_memcpy"].value == pytest.approx(1.25)


def test_a_notice_is_measured_against_its_goal() -> None:
    _, ratios = summarize_rounds(measured())

    assert ratios["shm_64k_notice_p50_vs_150us"].verdict == "reached"
    assert ratios["tcp_64k_notice_p50_vs_200us"].verdict == "missed"


def test_integrity_costs_what_the_checked_case_takes_longer() -> None:
    _, ratios = summarize_rounds(measured(shm_contiguous_checked=0.25))

    assert ratios["shm_contiguous_checked_vs_unchecked"].value == pytest.approx(0.5)


def test_several_pairs_move_the_bytes_of_all_of_them() -> None:
    rows, _ = summarize_rounds(measured(shm_pairs_4=0.4))

    row = next(row for row in rows if row["case"] == "shm_pairs_4")
    assert row["gb_per_s_p50"] == pytest.approx(10.0)
