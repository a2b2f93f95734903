"""Starts a cluster with the `celeriac` command, as a user would, and says how it is laid out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import ClusterNotStarted

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0


class Cluster:
    """One cluster in a run folder of its own. A context manager: it is stopped on the way out."""

    def __init__(self, run_dir: Path, flags: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """`flags` of `celeriac up`, for example `["--both", "2"]`; `env`: variables added to ours."""
        self._run_dir = run_dir
        self._flags = list(flags)
        self._env = {**os.environ, **(env or {})}
        self.url = ""
        self.layout = ""
        self.status: dict[str, Any] = {}

    def __enter__(self) -> Cluster:
        flags = ["--detach", "--port", "0", "--flower-port", "0", "--run-dir", str(self._run_dir), *self._flags]
        try:
            self._celeriac("up", *flags, timeout_s=START_TIMEOUT_S)
            status = json.loads(self._celeriac("status", "--json", "--run-dir", str(self._run_dir)))
        except BaseException:
            self._stop()
            raise
        self.status = status
        self.url = status["gateway"][0]["url"]
        self.layout = describe_layout(status["workers"])
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        subprocess.run(
            [sys.executable, "-m", "celeriac", "down", "--run-dir", str(self._run_dir)],
            capture_output=True, timeout=STOP_TIMEOUT_S, check=False,
        )  # fmt: skip

    def _celeriac(self, *args: str, timeout_s: float = 60.0) -> str:
        command = [sys.executable, "-m", "celeriac", *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=self._env)
        if done.returncode:
            raise ClusterNotStarted(" ".join(command), (done.stderr or done.stdout)[-4000:])
        return done.stdout


def describe_layout(workers: Sequence[dict[str, Any]]) -> str:
    """`1 prefill + 1 decode (cpus p0: 0, d0: 1)`: roles, and the cores that each worker's engine may use."""
    roles = Counter(str(worker["role"]) for worker in workers)
    counts = " + ".join(f"{roles[role]} {role}" for role in ("prefill", "decode", "both") if roles[role])
    cpus = [
        f"{str(worker['node']).split('@')[0]}: {allowed}"
        for worker in workers
        if (allowed := _allowed_cpus((worker.get("engine_pids") or [0])[0]))
    ]
    return f"{counts} (cpus {', '.join(cpus)})" if cpus else counts


def _allowed_cpus(pid: int) -> str:
    """The cores a process of this machine may run on, "" where that cannot be read."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines() if pid else []
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("Cpus_allowed_list")), "")
