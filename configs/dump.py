"""Settings back into YAML that `configs.load` reads: cluster.yaml of a run folder, and `celeriac config show`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from configs.fields import Field, all_fields, value_at
from configs.schema import Settings
from configs.values import format_value

HIDDEN = "********"


def to_yaml(settings: Settings, *, origins: Mapping[str, str] | None = None, hide_secrets: bool = False) -> str:
    """One line per setting; with `origins` each says where it comes from."""
    lines: list[str] = []
    section = ""
    for path, field in all_fields().items():
        head, _, name = path.rpartition(".")
        if head and head != section:
            section = head
            lines.append(f"{section}:")
        text = _scalar(field, shown_value(settings, path) if hide_secrets else value_at(settings, path))
        line = f"{'  ' if head else ''}{name or path}: {text}"
        lines.append(f"{line:<52}  # {origins[path]}" if origins is not None else line)
    return "\n".join(lines) + "\n"


def shown_value(settings: Settings, path: str) -> Any:
    """The value as people may see it: passwords are stars."""
    value = value_at(settings, path)
    hide: Callable[[str], str] | None = {"flower.basic_auth": _hide_all}.get(path)
    if path.endswith("_url"):
        hide = without_password
    return hide(value) if hide is not None and value else value


def without_password(url: str) -> str:
    """The URL for messages.

    >>> without_password("redis://:hunter2@db:6379/0")
    'redis://:********@db:6379/0'
    """
    parts = urlsplit(url)
    if parts.password is None:
        return url
    user_and_password, _, host = parts.netloc.rpartition("@")
    user = user_and_password.partition(":")[0]
    return urlunsplit(parts._replace(netloc=f"{user}:{HIDDEN}@{host}"))


def _hide_all(_: str) -> str:
    return HIDDEN


def _scalar(field: Field, value: Any) -> str:
    text = format_value(field, value)
    return json.dumps(text, ensure_ascii=False) if field.kind in ("str", "size") else text
