from __future__ import annotations

import json
from pathlib import Path

import pytest

from compose.cli import cli, up_flags
from compose.cli_base import run_cli


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("CELERIAC_CONFIG", raising=False)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        run_cli(cli, args)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return int(left.value.code or 0), captured.out, captured.err


def given(**changed: object) -> dict[str, object]:
    names = ("model", "prefill", "decode", "both", "port", "flower_port", "dtype", "run_dir", "redis_url")
    return {**dict.fromkeys(names), "assignments": (), **changed}


def test_a_misspelt_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "statsu")
    assert code == 2
    assert "Did you mean `status`?" in err


def test_a_misspelt_flag_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "up", "--detech")
    assert code == 2
    assert "--detach" in err


@pytest.mark.parametrize("command", [[], ["up"], ["config", "check"], ["worker"], ["gateway"], ["logs"]])
def test_every_command_has_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, *command, "--help")
    assert code == 0
    assert out.startswith("Usage: celeriac")


def test_a_missing_argument_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "config", "check")
    assert code == 2
    assert "FILE" in err


def test_no_running_cluster_is_the_environments_fault(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("status", "down"):
        code, _, err = run(capsys, command)
        assert code == 3
        assert "No cluster runs in" in err


def test_bad_settings_leave_with_two_and_every_fault(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("kv:\n  block_size: 3\ngateway:\n  prot: 1\n  port: x\n")
    code, _, err = run(capsys, "config", "check", str(file))
    assert code == 2
    assert len(err.splitlines()) == 2
    assert "did you mean `gateway.port`?" in err


def test_up_refuses_a_setting_that_nothing_reads_before_it_touches_anything(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = run(capsys, "up", "--set", "decode.max_batch_size=7", "--run-dir", str(tmp_path / "r"))
    assert code == 2
    assert "--set decode.max_batch_size: decode.max_batch_size: 7 would be ignored" in err
    assert not (tmp_path / "r").exists()


def test_a_bad_flag_is_reported_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "up", "--prefill", "two", "--port", "70000")
    assert code == 2
    assert "--prefill: prefill.num_workers: 'two' is not a whole number" in err
    assert "--port: gateway.port: 70000 is out of range; expected a whole number, 0 to 65535" in err


def test_config_show_tells_origins(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERIAC_GATEWAY__PORT", "9000")
    _, out, _ = run(capsys, "config", "show", "--json")
    assert json.loads(out)["gateway.port"] == {"value": 9000, "origin": "CELERIAC_GATEWAY__PORT"}
    _, out, _ = run(capsys, "config", "show", "--origin")
    assert any("port: 9000" in line and "# CELERIAC_GATEWAY__PORT" in line for line in out.splitlines())


def test_monolithic_workers_stand_alone_unless_others_are_asked_for() -> None:
    flags, _ = up_flags(given(both="2"))
    assert (flags["both.num_workers"], flags["prefill.num_workers"], flags["decode.num_workers"]) == ("2", "0", "0")
    flags, _ = up_flags(given(both="1", prefill="1", decode="1"))
    assert (flags["prefill.num_workers"], flags["decode.num_workers"]) == ("1", "1")
