"""Text -> the value of one setting, or what is wrong with it. The same for file, environment and flags."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from configs.fields import Field
from configs.suggest import did_you_mean
from configs.units import SIZE_EXPECTED, format_size, parse_bool, parse_float, parse_int, parse_size

_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "int": parse_int,
    "float": parse_float,
    "bool": parse_bool,
    "size": parse_size,
    "str": str,
}
_EXAMPLES: Final = {"int": "a whole number", "float": "a number", "bool": "true or false", "size": SIZE_EXPECTED}


class BadValue(ValueError):
    """Why a text is no value of a setting; becomes a `ConfigFault`."""

    def __init__(self, what: str, expected: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.expected = expected
        self.hint = hint


def parse_value(field: Field, text: str | None) -> Any:
    """The typed value.

    Raises:
        BadValue: another type, or out of range.
    """
    if text is None:
        raise BadValue("no value", f'{expectation(field)} (or "" for an empty text)')
    if field.kind == "choice":
        if text not in field.choices:
            raise BadValue(f"{text!r} is none of the choices", expectation(field), did_you_mean(text, field.choices))
        return text
    try:
        value = _PARSERS[field.kind](text)
    except ValueError as error:
        raise BadValue(str(error), expectation(field)) from None
    _check_range(field, value)
    return value


def _check_range(field: Field, value: Any) -> None:
    if isinstance(value, str):
        if field.min_length and len(value) < field.min_length:
            raise BadValue("an empty text", "at least one character")
        if field.pattern and not re.search(field.pattern, value):
            raise BadValue("a text of another form", f"the form {field.pattern}")  # not shown: it may hold a password
        return
    too_low = (field.ge is not None and value < field.ge) or (field.gt is not None and value <= field.gt)
    if too_low or (field.le is not None and value > field.le):
        raise BadValue(f"{_shown(field, value)} is out of range", expectation(field))


def expectation(field: Field) -> str:
    """What a value of this setting looks like, for people."""
    if field.kind == "choice":
        return "one of " + ", ".join(field.choices)
    words = _EXAMPLES.get(field.kind, "a text")
    limits = range_of(field)
    return f"{words}, {limits}" if limits else words


def range_of(field: Field) -> str:
    """ "1 to 64", "more than 0", "": the allowed range of a number."""
    low = field.ge if field.ge is not None else field.gt
    if low is None:
        return ""
    more = "more than " if field.ge is None else ""
    if field.le is None:
        return f"{more}{_shown(field, low)}" if more else f"at least {_shown(field, low)}"
    return f"{more}{_shown(field, low)} to {_shown(field, field.le)}"


def format_value(field: Field, value: Any) -> str:
    """As one writes it in YAML or on a command line; `parse_value` reads it back."""
    if field.kind == "bool":
        return "true" if value else "false"
    return _shown(field, value)


def _shown(field: Field, value: Any) -> str:
    if field.kind == "size":
        return format_size(int(value))
    return f"{value:g}" if isinstance(value, float) and value == round(value, 6) else str(value)
