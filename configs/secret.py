"""The cluster secret: what proves to a peer that a worker belongs here. Never printed, never in an argument list."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from configs.errors import SecretError
from configs.loader import SECRET_VARIABLE
from configs.relations import MIN_SECRET_BYTES
from configs.schema import Settings


def secret(settings: Settings, *, env: Mapping[str, str] | None = None) -> bytes:
    """The secret: $CELERIAC_CLUSTER_SECRET, else the file `secret_file`.

    Raises:
        SecretError: no such file, others may read it, or it is too short.
    """
    given = (os.environ if env is None else env).get(SECRET_VARIABLE)
    if given is not None:
        return _long_enough(f"${SECRET_VARIABLE}", given.strip().encode())
    path = Path(settings.secret_file)
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except OSError as error:
        hint = f"Start `celeriac up`, which makes one, copy the cluster's file there, or set ${SECRET_VARIABLE}."
        raise SecretError(str(path), f"cannot be read ({error.strerror})", hint) from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise SecretError(str(path), f"others may read it (mode {stat.S_IMODE(mode):04o})", f"Run `chmod 600 {path}`.")
    return _long_enough(str(path), content.strip())


def make_secret(path: Path) -> None:
    """Write a new one, mode 0600, if there is none."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    with os.fdopen(fd, "w") as file:
        file.write(secrets.token_hex(32) + "\n")


def _long_enough(where: str, content: bytes) -> bytes:
    if len(content) < MIN_SECRET_BYTES:
        hint = (
            f"Expected at least {MIN_SECRET_BYTES} characters nobody can guess, such as `openssl rand -hex 32` prints."
        )
        raise SecretError(where, f"it has only {len(content)} characters", hint)
    return content
