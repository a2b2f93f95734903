"""What the speculation benchmark compares."""

from __future__ import annotations

from benchmarks import engine_speculation
from benchmarks.engine_report import speculation_sheets
from benchmarks.engine_shapes import SHAPES
from benchmarks.engine_speculation import NUM_PROMPTS, NUM_REPEATS, PASSAGE_TOKENS, SpeculationSpec


class FakeEngine:
    """Takes half as long from its second job on, and has guessed so many tokens by its n-th job."""

    def __init__(self, seconds: float, drafted: int, ids: list[int]) -> None:
        self._seconds, self._drafted, self._ids = seconds, drafted, ids
        self._num_jobs = 0

    def run(self, job: dict[str, object]) -> dict[str, object]:
        assert job["wants_counters"]
        self._num_jobs += 1
        counters = {"draft_tokens": self._drafted, "kept_draft_tokens": self._drafted // 4, "steps": 4}
        return {
            "seconds": self._seconds if self._num_jobs > 1 else 100.0,
            "num_tokens": 8,
            "counters": {name: value * self._num_jobs for name, value in counters.items()},
            "token_ids": [self._ids],
        }


def test_repetitive_prompts_repeat_and_plain_ones_do_not() -> None:
    for shape in ("tiny-chat", "135m"):
        kinds = engine_speculation._prompts(SHAPES[shape])
        assert [len(prompts) for prompts in kinds.values()] == [NUM_PROMPTS, NUM_PROMPTS]
        assert all(ids == ids[:PASSAGE_TOKENS] * NUM_REPEATS for ids in kinds["repetitive"])
        assert all(ids[: len(ids) // 2] != ids[len(ids) // 2 :] for ids in kinds["plain"])


def test_the_warm_up_counts_neither_in_the_ratio_nor_in_the_guesses() -> None:
    spec = SpeculationSpec(shapes=("135m",), num_rounds=10, dtype="float32", cpus=(0,), output_len=8)
    engines = {"off": FakeEngine(6.0, 0, [1, 2]), "ngram": FakeEngine(2.0, 12, [1, 3])}

    row, ratio = engine_speculation._compare(spec, engines, [[1, 2]])  # type: ignore[arg-type]

    assert (round(ratio.value, 6), ratio.num_rounds) == (3.0, 10)
    assert (row["draft_tokens"], row["acceptance"], row["tokens_per_step"]) == (120, 0.25, 2.0)
    assert row["num_differing"] == 1
    (sheet,) = speculation_sheets([{"shape": "135m", "prompts": "plain", **row}])
    assert sheet.rows[0][4:] == ["2.00", "25%", "120", "1"]
