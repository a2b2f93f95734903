"""A venv of its own for a rival program, made once in a cache folder. Nothing of it touches the project's own venv."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.errors import ProgramFailed

INSTALL_TIMEOUT_S: Final = 3600.0
_STAMP: Final = ".celeriac-ready"


@dataclass(frozen=True)
class RivalVenv:
    """What a rival's venv holds.

    Attributes:
        name: of its folder in the cache, and in messages.
        requirements: what stands for its content: another list makes it again.
        needed_bytes: of disk, with downloads and builds.
        install: puts the requirements into it; given the venv's Python.
    """

    name: str
    requirements: tuple[str, ...]
    needed_bytes: int
    install: Callable[[Path], None]

    def ensure(self, folder: Path | None, *, say: Callable[[str], None]) -> Path:
        """The Python of the venv in `folder` (None: the cache), made on this call if it is not there. May take minutes.

        Raises:
            ProgramFailed: no disk, or pip failed.
        """
        folder = folder or cache_folder() / f"{self.name}-venv"
        python, stamp, want = folder / "bin" / "python", folder / _STAMP, " ".join(self.requirements)
        if stamp.is_file() and stamp.read_text() == want:
            return python
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < self.needed_bytes:
            problem = f"{free >> 20} MiB are free in {folder.parent}, {self.needed_bytes >> 20} MiB are needed"
            raise ProgramFailed(f"venv of {self.name}", problem, "")
        say(f"making a venv for {self.requirements[0]} in {folder} (about {self.needed_bytes / 1e9:.1f} GB; once)")
        run_tool(self.name, [sys.executable, "-m", "venv", "--clear", str(folder)])
        self.install(python)
        stamp.write_text(want)
        return python


def pip_install(name: str, python: Path, *what: str, env: Mapping[str, str] | None = None) -> None:
    """Raises ProgramFailed with pip's last words."""
    argv = [str(python), "-m", "pip", "install", "--no-input", "--quiet", "--progress-bar", "off", *what]
    run_tool(name, argv, env=env)


def run_tool(name: str, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> str:
    """Standard output of a command that makes a venv.

    Raises:
        ProgramFailed: it failed, or took longer than an hour.
    """
    command = f"`{' '.join(argv[:6])} ...`"
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
            env={**os.environ, **(env or {})},
        )
    except subprocess.TimeoutExpired as error:
        problem = f"{command} did not end within {INSTALL_TIMEOUT_S:g} s"
        raise ProgramFailed(f"venv of {name}", problem, "") from error
    if done.returncode:
        raise ProgramFailed(f"venv of {name}", f"{command} failed", (done.stderr or done.stdout)[-4000:])
    return done.stdout


def cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache, "celeriac")
