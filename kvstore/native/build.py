"""Compile C++ for this machine, once: a library lies in a cache folder under a name that says what made it.

    $XDG_CACHE_HOME/celeriac/kernels/<digest of sources, compiler, flags, CPU>.so      next to it: lock

Processes that start together wait for one of them (a file lock); a new version, compiler or CPU makes a new file.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from kvstore.errors import NativeUnavailable

COMPILE_TIMEOUT_S: Final = 180.0


@dataclass(frozen=True)
class Sources:
    """One library: a folder of C++, the file in it that includes the rest, and how to compile it."""

    folder: Path
    main: str
    flags: tuple[str, ...]


def build_library(sources: Sources) -> Path:
    """The compiled library. Blocks: some seconds the first time, while another process compiles it, too.

    Raises:
        NativeUnavailable: there is no compiler, it failed, or there is no folder to write to.
    """
    compiler = _compiler()
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise NativeUnavailable(why=f"{folder} belongs to another user", hint="Set XDG_CACHE_HOME to your own.")
        path = folder / f"{_digest(compiler, sources)}.so"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(compiler, sources, path)
    except OSError as error:
        raise NativeUnavailable(why=str(error), hint="Set XDG_CACHE_HOME to a folder that can be written.") from error
    return path


@cache
def load_library(sources: Sources) -> ctypes.CDLL:
    """`build_library`, and the library itself: once per process. Its functions release the GIL.

    Raises:
        NativeUnavailable: as `build_library`; or the file does not load.
    """
    path = build_library(sources)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeUnavailable(why=f"{path} does not load: {error}", hint="Delete it; it is built again.") from error


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "celeriac" / "kernels"


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return found
    raise NativeUnavailable(why="there is no C++ compiler", hint="Install g++, or name one in $CXX.")


def _compile(compiler: str, sources: Sources, path: Path) -> None:
    """To a temporary name first: what has the final name is whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "library.so"
        command = [compiler, *sources.flags, str(sources.folder / sources.main), "-o", str(made)]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise NativeUnavailable(why=f"{compiler} took over {COMPILE_TIMEOUT_S} s", hint="Try again.") from error
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
            first = next((line for line in lines if "error" in line), lines[0])
            raise NativeUnavailable(why=f"{compiler} failed: {first}", hint="Expected g++ 12 or later.")
        made.replace(path)


def _digest(compiler: str, sources: Sources) -> str:
    """What the machine code depends on. -march=native makes the CPU a part of it: homes may be shared by machines."""
    digest = hashlib.sha256(repr((sources.main, sources.flags, platform.machine(), _cpu())).encode())
    stat = Path(compiler).resolve().stat()
    digest.update(repr((compiler, stat.st_size, stat.st_mtime_ns)).encode())
    for source in sorted(sources.folder.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:32]


def _cpu() -> tuple[str, ...]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return (platform.processor(),)
    return tuple(line for line in lines if line.split("\t")[0].strip() in ("flags", "Features", "model name"))
