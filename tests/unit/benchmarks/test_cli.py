"""`celeriac bench` from its options to its output, against a small server on the loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner

from benchmarks.cli import bench
from benchmarks.cluster import Cluster
from benchmarks.compare import compare
from benchmarks.load import Fixed, LoadSpec
from benchmarks.serve import Slo
from tests.unit.benchmarks.fake_server import FakeServer

FAST = ["--rate", "inf", "--num-requests", "3", "--input-len", "5", "--output-len", "3"]


class RunningCluster:
    """What `compare` needs of a cluster that is up already."""

    def __init__(self, url: str, layout: str) -> None:
        self.url = url
        self.layout = layout


def test_serve_prints_one_json_object_and_writes_a_plot(tmp_path: Path) -> None:
    with FakeServer() as url:
        result = CliRunner().invoke(bench, ["serve", "--url", url, *FAST, "--json", "--plot", f"{tmp_path}/plot.png"])

    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["rows"][0]["num_ok"] == 3
    assert answer["rows"][0]["layout"] == "1 prefill"
    assert answer["ratios"] == {}
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_serve_prints_a_table_with_the_goodput() -> None:
    with FakeServer() as url:
        result = CliRunner().invoke(bench, ["serve", "--url", url, *FAST, "--slo-ttft-ms", "10000"])

    assert result.exit_code == 0, result.output
    for word in ("TTFT", "ITL", "TPOT", "E2E", "own lag", "server: queue", "goodput", "100 % within"):
        assert word in result.stdout


def test_run_without_one_good_answer_fails() -> None:
    with FakeServer("", status=503) as url:
        result = CliRunner().invoke(bench, ["serve", "--url", url, *FAST])

    assert result.exit_code == 1
    assert "http_503 x 3" in result.stdout


def test_server_that_is_not_there_is_named() -> None:
    result = CliRunner().invoke(bench, ["serve", "--url", "http://127.0.0.1:9", *FAST])

    assert result.exit_code == 1
    assert "http://127.0.0.1:9: GET /v1/models failed" in result.output


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--num-requests", "3", "--duration", "2"], "exclude each other"),
        (["--rate", "0"], "positive number"),
        (["--rate", "inf", "--duration", "2"], "needs --num-requests"),
        (["--input-len", "some"], "length 'some': not understood"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], problem: str) -> None:
    result = CliRunner().invoke(bench, ["serve", *options])

    assert result.exit_code != 0
    assert problem in result.output


def test_compare_interleaves_equal_loads_and_gives_ratios() -> None:
    first, second = FakeServer(), FakeServer()
    spec = LoadSpec(float("inf"), Fixed(5), Fixed(3), num_requests=3, seed=4)

    with first as url_a, second as url_b:
        rows, ratios = compare(
            cast(Cluster, RunningCluster(url_a, "2 both")),
            cast(Cluster, RunningCluster(url_b, "1 prefill + 1 decode")),
            spec,
            num_rounds=2,
            slo=Slo(),
        )

    assert [row["layout"] for row in rows] == ["2 both", "1 prefill + 1 decode"]
    assert [row["num_ok"] for row in rows] == [6, 6]
    assert sorted(json.dumps(body) for body in first.bodies) == sorted(json.dumps(body) for body in second.bodies)
    assert {"ttft_p50", "itl_p99", "output_tokens_per_s", "goodput_rps"} <= set(ratios)


def test_engine_measures_one_thing_at_a_time() -> None:
    result = CliRunner().invoke(bench, ["engine", "--isolation", "--profile"])

    assert result.exit_code == 2
    assert "exclude each other" in result.output


def test_engine_refuses_more_threads_than_cores() -> None:
    result = CliRunner().invoke(bench, ["engine", "--threads", "100000"])

    assert result.exit_code == 1
    assert "--threads 100000 needs 100000 cores" in result.output
