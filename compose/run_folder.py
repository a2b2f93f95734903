"""The folder of one local cluster: its lock, its settings, its secret, its logs and what runs.

lock, supervisor.pid    held and written by the supervisor
cluster.yaml, secret    read by every process of the cluster (see `configs.run_dir`)
state.json              what runs, written by the supervisor when it changes, read by `status`
logs/<name>.log         one file per process, appended
valkey/                 the embedded server's data
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from compose.errors import ClusterRunning, EnvironmentProblem
from configs.dump import to_yaml
from configs.run_dir import CLUSTER_FILE, LOCK_FILE, is_running
from configs.schema import Settings
from configs.secret import make_secret


class RunFolder:
    """Paths for everybody; what writes is for the one process that has called `acquire`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_fd = -1

    @property
    def cluster_file(self) -> Path:
        return self.path / CLUSTER_FILE

    @property
    def valkey_dir(self) -> Path:
        return self.path / "valkey"

    def log_path(self, name: str) -> Path:
        return self.path / "logs" / f"{name}.log"

    @property
    def is_running(self) -> bool:
        return is_running(self.path)

    @property
    def supervisor_pid(self) -> int | None:
        try:
            return int((self.path / "supervisor.pid").read_text())
        except (OSError, ValueError):
            return None

    def acquire(self) -> None:
        """Make the folder, and take the lock; one of a dead supervisor is free.

        Raises:
            ClusterRunning: another supervisor has it.
            EnvironmentProblem: the folder cannot be written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.path / "logs").mkdir(mode=0o700, exist_ok=True)
            fd = os.open(self.path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EnvironmentProblem(
                f"The run folder {self.path} cannot be used ({error.strerror}). Expected a folder that this user may "
                "write; name another one with `--run-dir`."
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise ClusterRunning(self.path, self.supervisor_pid) from None
        self._lock_fd = fd
        _write(self.path / "supervisor.pid", f"{os.getpid()}\n")

    def release(self) -> None:
        """The cluster is down. Logs, secret and data stay."""
        for name in ("supervisor.pid", CLUSTER_FILE, "state.json"):
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def write_settings(self, settings: Settings) -> None:
        """cluster.yaml, complete: it may hold passwords of URLs, so nobody else may read it."""
        make_secret(Path(settings.secret_file))
        _write(self.cluster_file, "# Settings of the running cluster, written by `celeriac up`.\n" + to_yaml(settings))

    def write_state(self, state: dict[str, Any]) -> None:
        _write(self.path / "state.json", json.dumps(state, indent=1) + "\n")

    def read_state(self) -> dict[str, Any]:
        """What the supervisor wrote last; empty if it did not get that far."""
        try:
            state = json.loads((self.path / "state.json").read_text())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def log_names(self) -> list[str]:
        return sorted(path.stem for path in (self.path / "logs").glob("*.log"))

    def log_tail(self, name: str, *, num_lines: int = 20) -> str:
        """Last lines of one process's log."""
        try:
            with self.log_path(name).open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 65536))
                return "\n".join(file.read().decode(errors="replace").splitlines()[-num_lines:])
        except OSError:
            return ""


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and for this user only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    temporary.replace(path)
