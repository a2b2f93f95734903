from __future__ import annotations

import json
from pathlib import Path

import pytest

from compose.cli import cli
from compose.cli_base import run_cli

LLAMA_70B = {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192, "torch_dtype": "float16"}


def estimate(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        run_cli(cli, ["kv", "estimate", *args])
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_70B))
    return path


def test_a_70b_prompt_of_2000_tokens_takes_420_ms_at_100_gigabits(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tokens", "2000", "--protocol", "rdma", "--gbps", "100", "--json"]

    code, out, _ = estimate(capsys, "--model", str(config), *flags)

    found = json.loads(out)
    assert code == 0
    assert found["kv_bytes_per_token"] == 2_621_440
    assert found["kv_bytes"] == 5_242_880_000
    assert found["wire_ms"] == pytest.approx(420, abs=1)
    assert found["total_ms"] == pytest.approx([422.4, 424.4], abs=0.1)


def test_a_folder_is_as_good_as_its_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = estimate(capsys, "--model", str(config.parent), "--protocol", "nvlink")

    assert code == 0
    assert "2.62 MB" in out
    assert "5.24 GB" in out


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_config_that_is_none_is_refused_in_one_line(
    text: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(text)

    code, _, err = estimate(capsys, "--model", str(config))

    assert code == 2
    assert err.count("\n") == 1
    assert "config.json" in err
