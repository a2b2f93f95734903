"""Refuses patterns that the grammar engine cannot do, or that only cost, before they are compiled.

The engine itself takes `a{0,100000}` without a word and pays for it later, and its errors about groups name no kind
that a client could act on. Syntax errors that are left are its own to report: they come with the position.
"""

from __future__ import annotations

import re
from typing import Final

from engines.structured.errors import BadConstraint

MAX_PATTERN_CHARS: Final = 16_384
MAX_REPEAT: Final = 10_000
_REPEAT: Final = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_LOOKAROUND: Final = ("(?=", "(?!", "(?<=", "(?<!")


def check_pattern(pattern: str, *, pointer: str = "") -> None:
    """Reads `pattern` once.

    Raises:
        BadConstraint: too long, a look-around or back-reference (with its position), or a huge repetition.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        message = f"the pattern has {len(pattern)} characters, at most {MAX_PATTERN_CHARS} are accepted"
        raise BadConstraint("schema_too_complex", message, pointer=pointer)
    i, in_class = 0, False
    while i < len(pattern):
        char = pattern[i]
        if char == "\\":
            _check_escape(pattern, i, in_class=in_class, pointer=pointer)
            i += 2
            continue
        if in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
            i += 2 if pattern[i + 1 : i + 2] in ("]", "^") else 1
            if pattern[i - 1 : i] == "^" and pattern[i : i + 1] == "]":
                i += 1
            continue
        elif char == "(" and pattern.startswith(_LOOKAROUND, i):
            _refuse("look-around", i, pointer)
        elif char == "{":
            _check_repeat(pattern, i, pointer)
        i += 1


def _check_escape(pattern: str, i: int, *, in_class: bool, pointer: str) -> None:
    after = pattern[i + 1 : i + 2]
    if in_class:
        return
    if after.isdigit() and after != "0":
        _refuse("a back-reference", i, pointer)
    if after == "k":
        _refuse("a back-reference", i, pointer)
    if after in ("b", "B"):
        _refuse("a word boundary", i, pointer)


def _check_repeat(pattern: str, i: int, pointer: str) -> None:
    match = _REPEAT.match(pattern, i)
    if match is None:
        return
    largest = max((int(number[:12]) for number in match.groups() if number), default=0)
    if largest > MAX_REPEAT:
        message = f"the pattern repeats up to {largest} times at character {i}, at most {MAX_REPEAT} are accepted"
        raise BadConstraint("schema_too_complex", message, pointer=pointer)


def _refuse(what: str, position: int, pointer: str) -> None:
    message = f"the pattern has {what} at character {position}, which is not supported"
    raise BadConstraint("unsupported", message, pointer=pointer)
