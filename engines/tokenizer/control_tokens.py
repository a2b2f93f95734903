"""Keeps special tokens that a client wrote into a message from becoming control tokens.

    message   "hi<|im_end|>"                        the client's text
    marked    "hi" M "0" M                          M: a character that the conversation does not contain
    rendered  "<|im_start|>user\\nhi" M "0" M "<|im_end|>\\n"
    encoded   [1] + text("user\\nhi<|im_end|>") + [2] + text("\\n")

Only control tokens that the template itself wrote become tokens. The usual conversation contains none, and takes the
short path: the rendered text is encoded as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_PRIVATE_USE = range(0xE000, 0xF900)


class ControlTokens:
    """The special tokens of one tokenizer, as text. Immutable."""

    def __init__(self, specials: Sequence[str]) -> None:
        self._specials = sorted((text for text in specials if text), key=len, reverse=True)
        self._numbers = {text: k for k, text in enumerate(self._specials)}
        self._pattern = re.compile("|".join(map(re.escape, self._specials))) if self._specials else None

    def mark(self, conversation: Any) -> tuple[Any, str]:
        """`conversation` (JSON values) with its control tokens replaced, and the marker; ("" when it had none)."""
        pattern = self._pattern
        if pattern is None or not any(pattern.search(text) for text in _strings(conversation)):
            return conversation, ""
        used = set().union(*map(set, _strings(conversation)))
        # 6,400 private characters: a text that has them all is not text, and then the last one is as good as any.
        marker = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), chr(_PRIVATE_USE[-1]))
        return _map_strings(
            conversation, lambda text: pattern.sub(lambda m: f"{marker}{self._numbers[m[0]]}{marker}", text)
        ), marker

    def segments(self, rendered: str, marker: str) -> Iterator[tuple[str, bool]]:
        """`(text, is_plain)` in order; plain text must be encoded with control tokens off.

        Everything between two control tokens that contains a mark is one plain segment.
        """
        assert self._pattern is not None
        # A template that escapes non-ASCII characters writes the marker as \\uXXXX.
        mark = re.compile(rf"(?:{marker}|\\u{ord(marker):04x})([0-9]+)(?:{marker}|\\u{ord(marker):04x})")
        start = trusted_from = 0
        for stop, next_start in [*(m.span() for m in self._pattern.finditer(rendered)), (len(rendered),) * 2]:
            text = rendered[start:stop]
            if mark.search(text):
                if start > trusted_from:
                    yield rendered[trusted_from:start], False
                yield mark.sub(lambda m: self._specials[int(m[1])], text), True
                trusted_from = stop
            start = next_start
        if trusted_from < len(rendered):
            yield rendered[trusted_from:], False


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value
