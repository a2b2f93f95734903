"""Scalars as people write them: sizes with a unit, numbers, booleans. One parser for file, environment and flags."""

from __future__ import annotations

import math
import re
from typing import Final

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)\Z")
_INT: Final = re.compile(r"-?(0|[1-9]\d*)\Z")
_FLOAT: Final = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?\Z")
UNITS: Final = {
    "B": 1,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
}
SIZE_EXPECTED: Final = 'a size with its unit, such as "512MiB" (2^20) or "2GB" (10^9)'


def parse_size(text: str) -> int:
    """Bytes of "2GiB".

    Raises:
        ValueError: with what is wrong: no unit, an unknown one, negative, or no number at all.
    """
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size")
    number, unit = match.groups()
    if not unit:
        raise ValueError(f"{text!r} has no unit")
    if unit not in UNITS:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}")
    num_bytes = float(number) * UNITS[unit] if "." in number else int(number) * UNITS[unit]
    if num_bytes > 1 << 60:
        raise ValueError(f"{text!r} is more than any machine has")
    return int(num_bytes)


def format_size(num_bytes: int) -> str:
    """The shortest exact way to write it: "1GiB", "1500MB", "123B". `parse_size` reads it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "kB"):
        if num_bytes and num_bytes % UNITS[unit] == 0:
            return f"{num_bytes // UNITS[unit]}{unit}"
    return f"{num_bytes}B"


def parse_int(text: str) -> int:
    """Decimal only: 08 and 1_000 mean different things to different readers.

    Raises:
        ValueError: not such a number.
    """
    if not _INT.match(text):
        raise ValueError(f"{text!r} is not a whole number")
    return int(text)


def parse_float(text: str) -> float:
    """A finite decimal number.

    Raises:
        ValueError: not such a number; NaN and infinity included.
    """
    if not _FLOAT.match(text) or not math.isfinite(float(text)):
        raise ValueError(f"{text!r} is not a number")
    return float(text)


def parse_bool(text: str) -> bool:
    """`true` or `false`: `yes`, `on` and 1 are text to some YAML readers and booleans to others.

    Raises:
        ValueError: anything else.
    """
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is not a boolean")
    return text == "true"
