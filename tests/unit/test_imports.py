"""torch stays where the engine is: a front, a gateway or a command line that imports it pays seconds and 200 MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
HEAVY = ("torch", "transformers")
LIGHT = {
    "front": "import tasks.app, tasks.pool, tasks.front",
    "gateway": "import webapp.server, webapp.app",
    "command line": "import compose.cli, compose.local, compose.status, compose.doctor",
    "planner": "import planner",
    "settings": "import configs",
    "engines from outside": "import engines.process, engines.messages, engines.tokenizer, engines.models.source",
}


def modules_after(statement: str, names: tuple[str, ...]) -> str:
    code = f"import sys\n{statement}\nprint(*[name for name in {names!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("who", LIGHT)
def test_torch_is_not_imported_by(who: str) -> None:
    assert modules_after(LIGHT[who], HEAVY) == ""


def test_settings_import_nothing_heavy() -> None:
    assert modules_after("import configs", ("redis", "celery", "flask", "click", "numpy")) == ""


def test_command_line_imports_neither_celery_nor_flask_before_it_knows_the_command() -> None:
    assert modules_after("import compose.cli", ("celery", "flask", "gunicorn", "huggingface_hub")) == ""
