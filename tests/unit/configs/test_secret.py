from __future__ import annotations

import sys
from pathlib import Path

import pytest

import configs
from configs.errors import SecretError, ShadowedPackage
from configs.origin_check import check_origin
from configs.secret import make_secret


def settings_in(folder: Path) -> configs.Settings:
    return configs.load(env={"HOME": "/h", "CELERIAC_RUN_DIR": str(folder)})


def test_a_made_secret_is_for_its_owner_only_and_stays(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    first = configs.secret(settings_in(tmp_path), env={})
    make_secret(tmp_path / "secret")
    assert configs.secret(settings_in(tmp_path), env={}) == first
    assert len(first) == 64


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    make_secret(tmp_path / "secret")
    (tmp_path / "secret").chmod(0o644)
    with pytest.raises(SecretError, match="chmod 600"):
        configs.secret(settings_in(tmp_path), env={})


def test_a_missing_or_short_secret_is_refused_and_never_printed(tmp_path: Path) -> None:
    with pytest.raises(SecretError, match="cannot be read"):
        configs.secret(settings_in(tmp_path), env={})
    with pytest.raises(SecretError) as caught:
        configs.secret(settings_in(tmp_path), env={"CELERIAC_CLUSTER_SECRET": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_the_environment_may_hold_the_secret(tmp_path: Path) -> None:
    env = {"CELERIAC_CLUSTER_SECRET": "0123456789abcdef"}
    assert configs.secret(settings_in(tmp_path), env=env) == b"0123456789abcdef"


def test_several_lines_are_several_secrets_the_current_one_first(tmp_path: Path) -> None:
    env = {"CELERIAC_CLUSTER_SECRET": "the newest secret\n\n  the older secret \n"}
    assert configs.secrets(settings_in(tmp_path), env=env) == (b"the newest secret", b"the older secret")
    with pytest.raises(SecretError):
        configs.secrets(settings_in(tmp_path), env={"CELERIAC_CLUSTER_SECRET": "the newest secret\nhunter2"})


def test_a_changed_file_is_read_again_and_a_bad_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CELERIAC_CLUSTER_SECRET", raising=False)
    path = tmp_path / "secret"
    rotating = configs.RotatingSecrets(settings_in(tmp_path), b"what it was started with")
    assert rotating() == (b"what it was started with",)
    make_secret(path)
    first = rotating()
    assert first == configs.secrets(settings_in(tmp_path), env={})
    path.write_bytes(b"the newest secret\n" + first[0] + b"\n")
    assert rotating() == (b"the newest secret", *first)
    path.write_bytes(b"short\n")
    assert rotating() == (b"the newest secret", *first)
    path.unlink()
    assert rotating() == (b"the newest secret", *first)


def test_a_foreign_package_in_front_of_ours_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_origin()
    foreign = tmp_path / "planted"
    (foreign / "webapp").mkdir(parents=True)
    (foreign / "webapp" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(foreign))
    for name in [name for name in sys.modules if name == "webapp" or name.startswith("webapp.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ShadowedPackage, match="planted/webapp/__init__"):
        check_origin()
