"""What can be wrong with settings, as one tree.

ConfigsError(retryable)
├── ConfigError        one or more faults in file, environment or flags; all are reported at once
├── SecretError        the cluster secret is missing, readable by others, or too short
└── ShadowedPackage    another distribution's package stands in front of one of ours
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class ConfigsError(Exception):
    """Base of all errors of this package. `retryable`: the same call may succeed later, unchanged."""

    retryable: bool = False


@dataclass(frozen=True)
class ConfigFault:
    """One thing that is wrong. `where`: `cluster.yaml:12`, `CELERIAC_KV__BLOCK_SIZE`, `--port`."""

    where: str
    path: str
    what: str
    expected: str = ""
    hint: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: {self.path}" if self.path else self.where
        rest = [self.what, f"expected {self.expected}" if self.expected else "", self.hint]
        return f"{place}: {'; '.join(part for part in rest if part)}"


class ConfigError(ConfigsError):
    """The settings cannot be used. `faults` has every one, in the order of the sources."""

    def __init__(self, faults: Sequence[ConfigFault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = tuple(faults)


class SecretError(ConfigsError):
    """The cluster secret cannot be used. The message never has the secret in it."""

    def __init__(self, path: str, what: str, hint: str) -> None:
        super().__init__(f"cluster secret {path}: {what}. {hint}")
        self.path = path
        self.what = what


class ShadowedPackage(ConfigsError):
    """`import <name>` finds somebody else's package."""

    def __init__(self, name: str, found: str, expected: str) -> None:
        super().__init__(
            f"`import {name}` finds {found}, which is not part of Celeriac (expected {expected}). "
            "Run in another folder, uninstall that package, or use a virtual environment of its own for Celeriac."
        )
        self.name = name
        self.found = found
        self.expected = expected
