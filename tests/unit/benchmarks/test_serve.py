"""A whole run against a small OpenAI-like server on the loopback."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.client import RequestRecord
from benchmarks.cluster import describe_layout
from benchmarks.load import Fixed, LoadSpec, PlannedRequest
from benchmarks.machine import describe_machine
from benchmarks.phases import PHASES
from benchmarks.report import plot_rows, result_object, to_json
from benchmarks.serve import Run, Slo, run_load, summarize_run
from benchmarks.stats import Ratio
from tests.unit.benchmarks.fake_server import GOOD, FakeServer, chunk, sse

SPEC = LoadSpec(float("inf"), Fixed(7), Fixed(3), num_requests=4)


def run(server: FakeServer, **kwargs: Any) -> Run:
    with server as url:
        return asyncio.run(run_load(url, SPEC, **kwargs))


def row_of(run: Run, slo: Slo | None = None) -> dict[str, Any]:
    return summarize_run(run, layout="1 both", rate_rps=2.0, slo=slo or Slo())


def test_run_counts_tokens_and_phases_of_every_request() -> None:
    server = FakeServer(GOOD)

    row = row_of(run(server))

    assert (row["num_requests"], row["num_ok"], row["errors"], row["model"]) == (4, 4, {}, "tiny")
    assert row["output_tokens_per_s"] == pytest.approx(12 / row["duration_s"])
    assert row["itl_ms"]["num"] == 8
    assert row["phases_ms"]["queue"]["p50"] == 1.5
    assert list(row["phases_ms"]) == [*PHASES, "handoff", "tokenize", "total", "ttft"]


def test_run_tells_what_a_handoff_costs_and_how_far_the_stamps_are_off() -> None:
    row = row_of(run(FakeServer(GOOD)))

    assert (row["handoff_minus_transfer_ms"]["p50"], row["handoff_minus_transfer_ms"]["num"]) == (4.0, 4)
    assert (row["closure_ms"]["max"], row["closure_ms"]["num"]) == (0.25, 4)


def test_prompts_have_their_lengths_and_are_all_different() -> None:
    server = FakeServer(GOOD)
    run(server)

    assert {len(body["prompt"]) for body in server.bodies} == {7}
    assert {body["max_tokens"] for body in server.bodies} == {3}
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 4


def test_concurrency_limit_holds() -> None:
    server = FakeServer(GOOD, crowd=2)
    run(server, concurrency_limit=2)

    assert server.max_live == 2


def test_without_a_limit_all_requests_run_together() -> None:
    server = FakeServer(GOOD, crowd=4)
    run(server)

    assert server.max_live == 4


@pytest.mark.parametrize(
    ("answer", "status", "error"),
    [
        ("", 429, "http_429"),
        (sse(chunk("a"), {"error": {"code": "engine_lost"}}, "[DONE]"), 200, "engine_lost"),
        (sse(chunk("a")), 200, "cut_stream"),
        (sse("[DONE]"), 200, "no_tokens"),
    ],
)
def test_failures_are_counted_by_their_code(answer: str, status: int, error: str) -> None:
    row = row_of(run(FakeServer(answer, status)))

    assert row["errors"] == {error: 4}
    assert (row["num_ok"], row["goodput_rps"]) == (0, 0.0)


def record(idx: int, *, lag_s: float = 0.0, ttft_s: float = 0.1, tpot_s: float = 0.01) -> RequestRecord:
    sent_s = 10.0 + lag_s
    stamps = [sent_s + ttft_s + k * tpot_s for k in range(5)]
    return RequestRecord(PlannedRequest(idx, 0.0, 1, 5, 0), 10.0, sent_s, stamps[-1], stamps, 1, 5)


def test_goodput_counts_requests_that_met_every_target() -> None:
    records = [record(0), record(1, ttft_s=0.3), record(2, tpot_s=0.05), record(3)]

    row = row_of(Run(records, 2.0, "tiny"), Slo(ttft_ms=200, tpot_ms=20))

    assert row["goodput_rps"] == 1.0
    assert row["slo_attainment"] == 0.5


def test_late_generator_makes_the_run_void() -> None:
    assert not row_of(Run([record(k, lag_s=0.004) for k in range(4)], 1.0, "tiny"))["is_void"]
    assert row_of(Run([record(k, lag_s=0.006) for k in range(4)], 1.0, "tiny"))["is_void"]


def test_json_has_the_machine_the_rows_and_the_ratios() -> None:
    row = row_of(Run([record(0)], 1.0, "tiny"))

    result = json.loads(to_json(result_object(describe_machine(), [row], {"ttft_p50": Ratio(1.1, 1.0, 1.2, 1.05)})))

    assert result["machine"]["num_cores"] >= 1
    assert result["rows"][0]["layout"] == "1 both"
    assert result["rows"][0]["slo"] == {"ttft_ms": None, "tpot_ms": None}
    assert result["ratios"]["ttft_p50"] == {
        "value": 1.1, "low": 1.0, "high": 1.2, "goal": 1.05, "at_most": False, "num_rounds": None,
        "verdict": "not resolvable here",
    }  # fmt: skip


def test_plot_is_written(tmp_path: Path) -> None:
    plot_rows(tmp_path / "plot.svg", [row_of(Run([record(0)], 1.0, "tiny"))])

    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_layout_counts_roles() -> None:
    workers = [{"role": role, "node": f"{role[0]}{k}@host"} for k, role in enumerate(["decode", "prefill", "decode"])]

    assert describe_layout(workers) == "1 prefill + 2 decode"
