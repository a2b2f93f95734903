"""A program that runs jobs for a benchmark: one JSON object per line in, one out.

    python -m engines.solo --jobs            one engine, without Celery, Redis and HTTP
    python -m engines.machine_rates          what this machine can do: memory bandwidth, matrix products
    <other venv>/python vllm_runner.py       the same jobs on vLLM

Programs stay up from job to job, so that the jobs of several can be interleaved. The idle ones wait in a read; those
that spin while they wait take cores from the one that works, so a program can be stopped (SIGSTOP) between its jobs.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.errors import ProgramFailed

START_TIMEOUT_S = 900.0  # a rival may compile its model first
JOB_TIMEOUT_S = 1200.0  # a prompt of 16,384 tokens on a full machine
STOP_TIMEOUT_S = 15.0
ROOT = Path(__file__).resolve().parent.parent


class Program:
    """One running program, with a run folder of its own. A context manager: it is ended on the way out, by force if
    need be. After an error or a signal by force at once: its job, which nobody waits for, may take minutes."""

    def __init__(
        self, name: str, argv: Sequence[str], *, env: Mapping[str, str], is_stopped_when_idle: bool = False
    ) -> None:
        self.name = name
        self._is_stopped_when_idle = is_stopped_when_idle
        self.facts: dict[str, Any] = {}
        self._argv = list(argv)
        self._scratch = tempfile.TemporaryDirectory(prefix="celeriac-bench-")
        self._env = {**os.environ, "CELERIAC_RUN_DIR": self._scratch.name, **env}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in __exit__)
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""

    def __enter__(self) -> Program:
        """Start it and wait for its first line.

        Raises:
            ProgramFailed: it ended, or was not ready in time.
        """
        self._process = subprocess.Popen(
            self._argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=self._env,
            cwd=ROOT,
            process_group=0,  # with its children; should we die, the kernel wakes a stopped group and ends it
        )
        try:
            self.facts = self._read_line(START_TIMEOUT_S)
            self._signal(signal.SIGSTOP)
        except BaseException:
            self._end(wait_s=0.0)
            raise
        return self

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run one job and wait for its result.

        Raises:
            ProgramFailed: the program ended, or did not answer in time.
        """
        assert self._process is not None and self._process.stdin is not None, "used outside its `with`"
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise ProgramFailed(self.name, "it ended", self._last_words()) from error
        result = self._read_line(JOB_TIMEOUT_S)
        self._signal(signal.SIGSTOP)
        return result

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._end(wait_s=STOP_TIMEOUT_S if error is None else 0.0)

    def _end(self, *, wait_s: float) -> None:
        process = self._process
        if process is not None and process.stdin is not None and process.stdout is not None:
            self._signal(signal.SIGCONT)
            if wait_s:
                process.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(wait_s)
            with contextlib.suppress(ProcessLookupError):  # nobody is left, mostly
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            with contextlib.suppress(BrokenPipeError):  # of a job that it did not read
                process.stdin.close()
            process.stdout.close()
        self._log.close()
        self._scratch.cleanup()

    def _signal(self, number: signal.Signals) -> None:
        if self._is_stopped_when_idle and self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended; the next read says so
                os.killpg(self._process.pid, number)

    def _read_line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        stdout = self._process.stdout
        end_s = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not select.select([stdout], [], [], max(0.0, end_s - time.monotonic()))[0]:
                raise ProgramFailed(self.name, f"no answer within {timeout_s:g} s", self._last_words())
            chunk = os.read(stdout.fileno(), 1 << 16)
            if not chunk:
                raise ProgramFailed(self.name, "it ended", self._last_words())
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\n", 1)
        result: dict[str, Any] = json.loads(line)
        return result

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-4000:]
