"""What can go wrong in `compose`, as one tree. `exit_code` is that of the command: 2 usage, 3 environment.

ComposeError(retryable, exit_code)
├── UsageProblem            a flag that cannot be used like this                                    2
└── EnvironmentProblem      this machine, or something on it, is not as it must be                  3
    ├── ClusterRunning      another supervisor holds the run folder
    ├── ClusterNotRunning   none does
    └── StartFailed         a process of the cluster did not become ready
"""

from __future__ import annotations

from pathlib import Path


class ComposeError(Exception):
    """Base of all errors of this package. `retryable`: the same call may succeed later, unchanged."""

    retryable: bool = False
    exit_code: int = 1


class UsageProblem(ComposeError):
    """The message names the flag and what it should be."""

    exit_code = 2


class EnvironmentProblem(ComposeError):
    """The message says what was found, what was expected and what to do. Several are one message, a line each."""

    exit_code = 3


class ClusterRunning(EnvironmentProblem):
    """A second supervisor for one run folder."""

    def __init__(self, run_dir: Path, pid: int | None) -> None:
        who = f"process {pid}" if pid else "another process"
        super().__init__(
            f"A cluster runs in {run_dir} already ({who}). Expected a folder of its own for each cluster: "
            "stop that one with `celeriac down`, or start this one with another `--run-dir`."
        )
        self.run_dir = run_dir
        self.pid = pid


class ClusterNotRunning(EnvironmentProblem):
    """Nothing to talk to."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(f"No cluster runs in {run_dir}. Start one with `celeriac up`, or name its `--run-dir`.")
        self.run_dir = run_dir


class StartFailed(EnvironmentProblem):
    """`log_tail`: the last lines of what that process wrote."""

    retryable = True

    def __init__(self, name: str, what: str, log_path: Path, log_tail: str) -> None:
        super().__init__(
            f"{name} {what}. Expected it to become ready; the end of {log_path}:\n{log_tail or '(empty)'}".rstrip()
        )
        self.name = name
        self.log_path = log_path
        self.log_tail = log_tail
