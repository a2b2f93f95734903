"""A CA and certificates for the tests of TLS, made by the openssl program in a folder of the test."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kvstore.transport.tls import TlsFiles

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="the openssl program is not installed")
_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class Ca:
    """Signs certificates. `name` keeps the files of several apart."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder, self._name = folder, name
        self.path = folder / f"{name}.pem"
        _openssl(
            "req", "-x509", *_KEY, "-keyout", f"{folder}/{name}.key", "-out", str(self.path), "-subj", f"/CN={name}",
            "-days", "2", "-addext", "keyUsage=keyCertSign",
        )  # fmt: skip

    def sign(self, name: str, *, days: int = 2, host: str = "127.0.0.1", trusts: Path | None = None) -> TlsFiles:
        """Files of a node. `days` below 0: expired. `trusts`: another CA to believe."""
        stem = self._folder / f"{self._name}-{name}"
        _openssl(
            "req", *_KEY, "-keyout", f"{stem}.key", "-out", f"{stem}.csr", "-subj", f"/CN={name}",
            "-addext", f"subjectAltName=IP:{host}",
        )  # fmt: skip
        _openssl(
            "x509", "-req", "-in", f"{stem}.csr", "-CA", str(self.path), "-CAkey", f"{self._folder}/{self._name}.key",
            "-copy_extensions", "copy", "-days", str(days), "-out", f"{stem}.pem",
        )  # fmt: skip
        return TlsFiles(f"{stem}.pem", f"{stem}.key", str(trusts or self.path))


def _openssl(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"openssl {' '.join(arguments)}: {done.stderr}"
