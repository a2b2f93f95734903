"""What the engine benchmarks say while they run, and in which form their results come."""

from __future__ import annotations

import itertools

from benchmarks.engine_determinism import first_difference
from benchmarks.engine_progress import RoundClock
from benchmarks.engine_report import determinism_sheets, ratio_sheets, speed_sheets
from benchmarks.engine_rivals import RIVALS
from benchmarks.engine_speed import turned
from benchmarks.sheets import Sheet, markdown
from benchmarks.stats import paired_ratio


def test_the_estimate_counts_the_rounds_that_are_left() -> None:
    clock = RoundClock("135m", num_rounds=4, num_parts=2, now_s=itertools.count(0.0, 10.0).__next__)

    lines = [clock.line(k, part, "x") for k in range(-1, 4) for part in range(2)]

    assert lines[0] == "135m, warm-up, about 90 s left, x"
    assert lines[4] == "135m, round 2 of 4, about 50 s left, x"
    assert lines[-1] == "135m, round 4 of 4, about 0 s left, x"


def test_every_program_is_first_and_comes_before_every_other_one() -> None:
    programs = ["ours", "a", "b"]

    orders = [turned(programs, turn) for turn in range(6)]  # type: ignore[arg-type]

    assert {order[0] for order in orders} == set(programs)  # type: ignore[comparison-overlap]
    for left, right in itertools.permutations(programs, 2):
        assert any(order.index(left) < order.index(right) for order in orders)  # type: ignore[arg-type]


def test_a_ratio_says_what_its_interval_says_about_the_goal() -> None:
    spread = [1.0, 1.4] * 5

    (sheet,) = ratio_sheets(
        {
            "decode_b1_135m_vs_vllm": paired_ratio([1.3] * 10, [1.0] * 10, goal=1.2),
            "decode_b8_135m_vs_vllm": paired_ratio(spread, [1.0] * 10, goal=1.2),
            "decode_b32_135m_vs_vllm": paired_ratio([1.0] * 10, [1.0] * 10, goal=1.1),
            "prefill_1x512_135m_vs_vllm": paired_ratio([2.0] * 9, [1.0] * 9, goal=1.0),
        }
    )

    assert [row[-1] for row in sheet.rows] == ["reached", "not resolvable here", "missed", "too few rounds"]
    assert sheet.notes


def test_speed_stands_beside_what_the_machine_reads_and_multiplies() -> None:
    row = {
        "shape": "135m",
        "program": "celeriac",
        "dtype": "bfloat16",
        "num_threads": 2,
        "device": "cpu",
        "num_rounds": 10,
        "tokens_per_s": {"p10": 9.0, "p50": 10.0, "p90": 11.0},
        "roof_tokens_per_s": 20.0,
        "roof_share": 0.5,
        "step_bytes": 270e6,
        "step_flops": 109e9,
        "achieved_gb_per_s": 2.7,
        "achieved_gflops": 300.0,
        "bandwidth_gb_per_s": 5.4,
        "gemm_gflops": 600.0,
    }

    (sheet,) = speed_sheets([{**row, "case": "decode_b1"}, {**row, "case": "prefill_1x512"}])

    assert list(sheet.rows[0][5:8]) == ["270 MB", "2.7 GB/s", "5.4 GB/s"]
    assert list(sheet.rows[1][5:8]) == ["109 GFLOP", "300 GFLOP/s", "600 GFLOP/s"]


def test_markdown_keeps_cells_apart() -> None:
    text = markdown([Sheet(("a", "b"), [["1|2", "x\ny"]], ["A note."])])

    assert text == "| a | b |\n|---|---|\n| 1\\|2 | x y |\n\nA note.\n"


def test_the_first_token_that_differs_is_found() -> None:
    assert first_difference([4, 5, 6], [4, 5, 7]) == 2
    assert first_difference([4, 5], [4, 5]) is None


def test_a_shape_without_a_difference_has_no_place_of_it() -> None:
    row = {
        "shape": "135m",
        "dtype": "bfloat16",
        "num_threads": 2,
        "batch": 16,
        "output_len": 128,
        "num_prompts": 64,
        "first_difference": {"p10": float("nan"), "p50": float("nan")},
        "num_differing": 0,
        "variant": "as set",
    }

    assert determinism_sheets([row])[0].rows == [["135m", "as set", "64", "0", ""]]


def test_rivals_are_known_by_name() -> None:
    assert list(RIVALS) == ["vllm", "transformers", "llama.cpp", "int8", "int4"]
