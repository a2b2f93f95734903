"""The gateway stays light: no torch, no transformers, no celery worker of an engine."""

from __future__ import annotations

import subprocess
import sys


def test_the_gateway_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, webapp.server, webapp.generate, webapp.ops_routes, webapp.request_routes, webapp.token_routes\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]", result.stdout
