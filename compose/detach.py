"""`up --detach`: the supervisor goes to the background, the command waits until it is ready and passes on its progress.

Two forks: the first child leaves the terminal's session and ends, so that the second can never get a terminal again and
belongs to init. Progress comes back over a pipe, a JSON line each; EOF without a verdict means that it was killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

Report = Callable[[str], None]
Verdict = Callable[[int], None]


def detached(work: Callable[[Report, Verdict], None], *, log_path: Path, show: Report) -> int:
    """Runs `work(report, verdict)` in the background. Returns the exit code that it hands to `verdict`.

    `work` must call `verdict` once; what it reports later goes to the log only. Must be called before any thread is
    started.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    first = os.fork()
    if first == 0:
        os.close(read_fd)
        os.setsid()
        if os.fork():
            os._exit(0)
        _background(work, write_fd, log_path)
    os.close(write_fd)
    os.waitpid(first, 0)
    return _follow(read_fd, show)


def _background(work: Callable[[Report, Verdict], None], write_fd: int, log_path: Path) -> None:
    """The second child: standard streams to the log, then the work. Never returns."""
    status = 1
    try:
        log_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for target, source in ((0, null), (1, log), (2, log)):
            os.dup2(source, target)
        is_open = True

        def tell(message: dict[str, object]) -> None:
            if is_open:
                with contextlib.suppress(OSError):
                    os.write(write_fd, (json.dumps(message) + "\n").encode())

        def report(line: str) -> None:
            print(line, flush=True)
            tell({"line": line})

        def verdict(code: int) -> None:
            nonlocal is_open
            tell({"code": code})
            is_open = False
            os.close(write_fd)

        tell({"pid": os.getpid()})
        work(report, verdict)
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def _follow(read_fd: int, show: Report) -> int:
    pid = 0
    with os.fdopen(read_fd, encoding="utf-8") as pipe:
        try:
            for line in pipe:
                message = json.loads(line)
                if "line" in message:
                    show(message["line"])
                pid = message.get("pid", pid)
                if "code" in message:
                    return int(message["code"])
        except KeyboardInterrupt:
            if pid:
                os.kill(pid, signal.SIGTERM)
            return 130
    return 1
