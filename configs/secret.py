"""The cluster secret: what proves to a peer that a worker belongs here. Never printed, never in an argument list.

One line, or several while it is rotated: the first is the current one, those after it are still accepted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets as random_secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from configs.errors import SecretError
from configs.loader import SECRET_VARIABLE
from configs.relations import MIN_SECRET_BYTES
from configs.schema import Settings

logger = logging.getLogger(__name__)


def secret(settings: Settings, *, env: Mapping[str, str] | None = None) -> bytes:
    """The current secret: the first of `secrets`. Raises SecretError."""
    return secrets(settings, env=env)[0]


def secrets(settings: Settings, *, env: Mapping[str, str] | None = None) -> tuple[bytes, ...]:
    """All that are accepted, the current one first: lines of $CELERIAC_CLUSTER_SECRET, else of the file `secret_file`.

    Raises:
        SecretError: no such file, others may read it, or a line is too short.
    """
    given = (os.environ if env is None else env).get(SECRET_VARIABLE)
    if given is not None:
        return _lines(f"${SECRET_VARIABLE}", given.encode())
    path = Path(settings.secret_file)
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        hint = f"Start `celeriac up`, which makes one, copy the cluster's file there, or set ${SECRET_VARIABLE}."
        raise SecretError(str(path), f"cannot be read ({error.strerror})", hint) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SecretError(str(path), f"others may read it (mode {stat.S_IMODE(mode):04o})", f"Run `chmod 600 {path}`.")
    return _lines(str(path), content)


class RotatingSecrets:
    """The accepted secrets of a process that runs on: the file is read again when it has changed.

    A file that cannot be used is logged once, and what was known stays. $CELERIAC_CLUSTER_SECRET does not change.
    """

    def __init__(self, settings: Settings, known: bytes) -> None:
        """`known`: the secret that this process was started with; accepted as long as no file says otherwise."""
        self._settings = settings
        self._secrets: tuple[bytes, ...] = (known,)
        self._stamp: tuple[int, int, int] | None = None

    def __call__(self) -> tuple[bytes, ...]:
        if SECRET_VARIABLE in os.environ:
            with contextlib.suppress(SecretError):
                self._secrets = secrets(self._settings)
            return self._secrets
        try:
            status = Path(self._settings.secret_file).stat()
        except OSError:
            return self._secrets
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._secrets = secrets(self._settings)
            except SecretError as error:
                logger.warning("%s The secrets of before stay.", error)
        return self._secrets


def make_secret(path: Path) -> None:
    """Write a new one, mode 0600, if there is none."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    with os.fdopen(fd, "w") as file:
        file.write(random_secrets.token_hex(32) + "\n")


def _lines(where: str, content: bytes) -> tuple[bytes, ...]:
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    return tuple(_long_enough(where, line) for line in lines or [b""])


def _long_enough(where: str, content: bytes) -> bytes:
    if len(content) < MIN_SECRET_BYTES:
        hint = (
            f"Expected at least {MIN_SECRET_BYTES} characters nobody can guess, such as `openssl rand -hex 32` prints."
        )
        raise SecretError(where, f"it has only {len(content)} characters", hint)
    return content
