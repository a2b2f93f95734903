from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

import configs
from compose.errors import ClusterRunning
from compose.run_folder import RunFolder


def test_a_second_supervisor_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "r"), RunFolder(tmp_path / "r")
    first.acquire()
    assert second.is_running
    with pytest.raises(ClusterRunning) as caught:
        second.acquire()
    assert caught.value.pid == os.getpid()

    first.release()
    assert not second.is_running
    second.acquire()
    second.release()


def test_the_lock_of_a_dead_supervisor_is_taken(tmp_path: Path) -> None:
    tmp_path.joinpath("lock").touch()
    tmp_path.joinpath("supervisor.pid").write_text("999999\n")
    folder = RunFolder(tmp_path)
    assert not folder.is_running
    folder.acquire()
    assert folder.supervisor_pid == os.getpid()
    folder.release()


def test_what_may_hold_passwords_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "r")
    folder.acquire()
    folder.write_settings(configs.load(env={"HOME": "/h", "CELERIAC_RUN_DIR": str(tmp_path / "r")}))
    for path in (folder.path, folder.cluster_file, folder.path / "secret"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077
    folder.release()
    assert not folder.cluster_file.exists()
    assert (folder.path / "secret").exists()
