"""Checks of single values: type, range, and a message that names the field, what was expected and what came.

Each checker is a small frozen object: `checker(value, path)` returns the value to use or raises InvalidRequest.
JSON numbers like 16.0 are integers too; booleans never are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from webapp.errors import InvalidRequest
from webapp.strict_json import kind_of

Checker = Callable[[Any, str], Any]


def shown(value: object) -> str:
    """What came, for a message: at most 200 characters, no text of prompts (callers never pass those)."""
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def wrong_type(path: str, expected: str, value: object) -> InvalidRequest:
    return InvalidRequest("invalid_type", f"{path} must be {expected} (got {kind_of(value)})", param=path)


def out_of_range(path: str, expected: str, value: object) -> InvalidRequest:
    return InvalidRequest("out_of_range", f"{path} must be {expected} (got {shown(value)})", param=path)


@dataclass(frozen=True)
class Boolean:
    def __call__(self, value: Any, path: str) -> bool:
        if not isinstance(value, bool):
            raise wrong_type(path, "a boolean", value)
        return value


@dataclass(frozen=True)
class Integer:
    low: int
    high: int
    words: str = ""  # the expectation, where a range says too little

    def __call__(self, value: Any, path: str) -> int:
        if isinstance(value, float) and math.isfinite(value) and value == int(value):
            value = int(value)
        if isinstance(value, float) and not math.isfinite(value):
            raise out_of_range(path, self._expected, value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise wrong_type(path, "an integer", value)
        if not self.low <= value <= self.high:
            raise out_of_range(path, self._expected, value)
        return value

    @property
    def _expected(self) -> str:
        return self.words or f"between {self.low} and {self.high}"


@dataclass(frozen=True)
class Number:
    low: float
    high: float
    open_low: bool = False

    def __call__(self, value: Any, path: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise wrong_type(path, "a number", value)
        above = value > self.low if self.open_low else value >= self.low
        if not (above and value <= self.high):  # false for NaN too
            expected = f"between {self.low:g} and {self.high:g}" + (f", not {self.low:g}" if self.open_low else "")
            raise out_of_range(path, expected, value)
        return float(value)


@dataclass(frozen=True)
class Text:
    """A string that can be encoded: lone surrogates are refused here, before Redis or the tokenizer meet them."""

    low: int = 0
    high: int = 1 << 30
    allow_nul: bool = True

    def __call__(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(path, "a string", value)
        if not self.low <= len(value) <= self.high:
            raise out_of_range(path, f"a string of {self.low} to {self.high} characters", f"{len(value)} characters")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                message = f"{path} holds a lone surrogate at character {error.start}; expected valid Unicode"
                raise InvalidRequest("invalid_value", message, param=path) from error
        if not self.allow_nul and "\x00" in value:
            raise InvalidRequest("invalid_value", f"{path} must not hold a NUL character", param=path)
        return value


@dataclass(frozen=True)
class OneOf:
    words: tuple[str, ...]

    def __call__(self, value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise wrong_type(path, "a string", value)
        if value not in self.words:
            message = f"{path} must be one of {', '.join(self.words)} (got {shown(value)})"
            raise InvalidRequest("invalid_value", message, param=path)
        return value


@dataclass(frozen=True)
class ListOf:
    item: Checker
    high: int

    def __call__(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise wrong_type(path, "an array", value)
        if len(value) > self.high:
            raise out_of_range(path, f"an array of at most {self.high} items", f"{len(value)} items")
        return [self.item(item, f"{path}[{i}]") for i, item in enumerate(value)]


@dataclass(frozen=True)
class Stop:
    """`stop`: one string or a list of them; neither empty nor long."""

    max_strings: int = 16
    max_chars: int = 1024

    def __call__(self, value: Any, path: str) -> tuple[str, ...]:
        check = Text(1, self.max_chars)
        if isinstance(value, str):
            return (check(value, path),)
        if not isinstance(value, list):
            raise wrong_type(path, "a string or an array of strings", value)
        return tuple(ListOf(check, self.max_strings)(value, path))


@dataclass(frozen=True)
class LogitBias:
    """`logit_bias`: token id, written as a string, to a bias."""

    vocab_size: int
    max_keys: int = 1024

    def __call__(self, value: Any, path: str) -> dict[int, float]:
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        if len(value) > self.max_keys:
            raise out_of_range(path, f"an object of at most {self.max_keys} keys", f"{len(value)} keys")
        bias: dict[int, float] = {}
        for key, amount in value.items():
            where = f'{path}["{key[:40]}"]'
            if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < self.vocab_size):
                message = f"{where}: keys must be token ids in 0..{self.vocab_size - 1}"
                raise InvalidRequest("out_of_range" if key.isdigit() else "invalid_value", message, param=where)
            bias[int(key)] = Number(-100, 100)(amount, where)
        if len(bias) >= self.vocab_size and all(amount <= -100 for amount in bias.values()):
            message = f"{path} forbids every token; leave at least one"
            raise InvalidRequest("invalid_value", message, param=path)
        return bias


@dataclass(frozen=True)
class Metadata:
    """`metadata`: up to 16 short pairs of strings."""

    def __call__(self, value: Any, path: str) -> dict[str, str]:
        if not isinstance(value, dict):
            raise wrong_type(path, "an object", value)
        if len(value) > 16:
            raise out_of_range(path, "an object of at most 16 keys", f"{len(value)} keys")
        for key, text in value.items():
            Text(1, 64, allow_nul=False)(key, f"{path}.{key[:40]}")
            Text(0, 512)(text, f"{path}.{key[:40]}")
        return dict(value)
