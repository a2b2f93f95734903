"""The schema as a flat table: dotted path -> type, range, default, description. Made once from `configs.schema`."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from configs.schema import Settings


@dataclass(frozen=True)
class Field:
    """One setting. `kind`: str, int, float, bool, choice or size (an int that is written with its unit)."""

    path: str
    kind: str
    default: Any
    description: str = ""
    choices: tuple[str, ...] = ()
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    min_length: int | None = None
    pattern: str | None = None

    @property
    def env_name(self) -> str:
        return "CELERIAC_" + self.path.upper().replace(".", "__")


@functools.cache
def all_fields() -> dict[str, Field]:
    """Every setting by its dotted path, in the order of the schema."""
    return {field.path: field for field in _fields_of(Settings, "")}


def section_doc(section: str) -> str:
    """First paragraph of a section's docstring."""
    kind = typing.get_type_hints(Settings)[section]
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


def value_at(settings: Settings, path: str) -> Any:
    """The value of a dotted path."""
    return functools.reduce(getattr, path.split("."), settings)


def _fields_of(struct: type[msgspec.Struct], prefix: str) -> list[Field]:
    hints = typing.get_type_hints(struct, include_extras=True)
    found: list[Field] = []
    for info in msgspec.structs.fields(struct):
        path = prefix + info.name
        hint = hints[info.name]
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            found += _fields_of(hint, path + ".")
        else:
            found.append(_field(path, hint, info.default))
    return found


def _field(path: str, hint: Any, default: Any) -> Field:
    limits: dict[str, Any] = {}
    while typing.get_origin(hint) is Annotated:
        for meta in hint.__metadata__:
            for name in ("description", "ge", "gt", "le", "min_length", "pattern"):
                if getattr(meta, name, None) is not None:
                    limits[name] = getattr(meta, name)
        hint = hint.__origin__
    if typing.get_origin(hint) is Literal:
        return Field(path, "choice", default, choices=typing.get_args(hint), **limits)
    kind = "size" if hint is int and path.endswith("_bytes") else hint.__name__
    return Field(path, kind, default, **limits)
