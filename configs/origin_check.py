"""Our packages have common names (`tasks`, `configs`). See that none of them is somebody else's."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from configs.errors import ShadowedPackage

PACKAGES: Final = ("configs", "kvstore", "engines", "tasks", "webapp", "compose")


def check_origin() -> None:
    """All packages must lie beside this one. Imports nothing.

    Raises:
        ShadowedPackage: names the file that stands in front of ours.
    """
    root = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = find_spec(name)
        found = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if found != root / name / "__init__.py":
            raise ShadowedPackage(name, str(found or "nothing"), str(root / name))
