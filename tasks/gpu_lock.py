"""One worker per GPU and host: a lock file per GPU index, held by flock for as long as the worker lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path

from tasks.errors import GpuInUse


class GpuLock:
    """Holds the pin. The kernel drops it with the process, however it dies; the pid in the file is for people."""

    def __init__(self, folder: Path, gpu: str, *, share: bool = False) -> None:
        """Take the lock; with `share`, only if it is free.

        Raises:
            GpuInUse: another worker of this host holds it, and this one does not want to share.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(folder / f"gpu-{gpu.replace('/', '_')}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if share:
                return
            holder = os.pread(self._fd, 32, 0).split()
            os.close(self._fd)
            raise GpuInUse(gpu=gpu, holder_pid=int(holder[0]) if holder else 0) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


def lock_folder() -> Path:
    """Where the lock files of this user and host are: a GPU is one, whatever cluster its worker belongs to."""
    return Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"celeriac-{os.getuid()}"
