"""Comparing the steps of two engines: what counts as equal work, and what a log half written gives."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.engine_steps import (
    CONTEXT_BIN_TOKENS,
    Step,
    StepLogReader,
    batch_sizes,
    match_bins,
    mean_cpu_ratio,
    mean_ratio,
)


def steps(num_seqs: int, step_ms: float, *, num: int = 5, context: int = 10, num_prompt_tokens: int = 0) -> list[Step]:
    return [Step(num_seqs, num_seqs + num_prompt_tokens, num_seqs * context, step_ms, 1.0)] * num


def test_equal_work_is_compared_bin_by_bin() -> None:
    loaded = steps(8, 11.0, num=9) + steps(64, 44.0)
    alone = steps(8, 10.0) + steps(64, 40.0, num=7)

    bins = match_bins(loaded, alone)

    assert [(each.bin.num_seqs, each.num_loaded, each.num_alone) for each in bins] == [(8, 9, 5), (64, 5, 7)]
    assert math.isclose(mean_ratio(bins), 1.1)
    assert mean_cpu_ratio(bins) == 1.0


def test_steps_with_a_prompt_in_them_do_not_count() -> None:
    assert match_bins(steps(8, 90.0, num_prompt_tokens=64), steps(8, 10.0)) == []


def test_other_batch_sizes_and_other_contexts_are_not_compared() -> None:
    loaded = steps(8, 10.0) + steps(9, 10.0, context=CONTEXT_BIN_TOKENS)

    assert match_bins(loaded, steps(7, 10.0) + steps(9, 10.0, context=CONTEXT_BIN_TOKENS - 1)) == []


def test_two_steps_are_too_few_for_a_median() -> None:
    assert match_bins(steps(8, 10.0, num=2), steps(8, 10.0)) == []


def test_bins_weigh_as_much_as_their_rarer_side() -> None:
    loaded = steps(8, 20.0, num=3) + steps(64, 10.0, num=12)
    alone = steps(8, 10.0, num=100) + steps(64, 10.0, num=9)

    assert math.isclose(mean_ratio(match_bins(loaded, alone)), 2 ** (3 / 12))


def test_no_bin_in_common_has_no_ratio() -> None:
    assert math.isnan(mean_ratio([]))


def test_batch_sizes_are_those_of_pure_decode_steps() -> None:
    mixed = steps(40, 1.0, num=60) + steps(64, 1.0, num=40) + steps(1, 1.0, num=300, num_prompt_tokens=9)

    assert batch_sizes(mixed) == (40, 64)
    assert batch_sizes([]) == (0, 0)


def test_reader_gives_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "d0.steps"
    reader = StepLogReader(path)

    assert reader.read_new() == []
    path.write_text("2\t2\t40\t1.5000\t1.2500\n3\t3\t60\t")
    assert reader.read_new() == [Step(2, 2, 40, 1.5, 1.25)]
    path.write_text("2\t2\t40\t1.5000\t1.2500\n3\t3\t60\t2.5000\t2.0000\n")
    assert reader.read_new() == [Step(3, 3, 60, 2.5, 2.0)]
    assert reader.read_new() == []
