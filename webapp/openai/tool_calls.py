"""Tool calls in the text of a reply, as it comes: Hermes form.

    text            Sure. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    events          Content("Sure.")  CallStarted(0, "f")  CallArguments(0, '{"a": 1}')

What has been told after some text depends on that text alone, never on how it was cut: streams and whole answers are
made by the same parser. So nothing is told that a later character could take back: the beginning of a tag and white
space wait for what follows; a call is told once its name is known, and its arguments as the model wrote them.
What is no call after all (no JSON object, no name) is content.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

OPEN: Final = "<tool_call>"
CLOSE: Final = "</tool_call>"
_ARGUMENTS: Final = ("arguments", "parameters")
MAX_NAMELESS_CHARS: Final = 2048  # what has no name by then is no call; bounds how much is read again
_WHITE: Final = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    k: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    k: int
    text: str


Event = Content | CallStarted | CallArguments


class ToolCallParser:
    """The parser of one choice. `only_first` drops every call but the first.

    Attributes:
        num_calls: calls told so far.
    """

    def __init__(self, *, only_first: bool = False) -> None:
        self.num_calls = 0
        self._only_first = only_first
        self._text = ""  # not told yet: outside of calls
        self._is_after_call = False
        self._before = ""  # white space in front of the tag of the open call
        self._call: _CallScanner | None = None
        self._closing = ""  # behind the object of a call: what may become its closing tag
        self._is_closing = False

    def feed(self, text: str) -> list[Event]:
        """Events that `text`, which follows all before it, releases."""
        return list(joined(event for char in text for event in self._char(char)))

    def end(self) -> list[Event]:
        """The reply is over. A call without a name was none; one whose arguments are cut stays as it is."""
        events: list[Event] = []
        if self._call is not None and not self._call.name:
            events.append(Content(self._before + OPEN + self._call.raw))
        elif self._call is None and not self._is_closing:
            is_rest_of_call = self._is_after_call and not self._text.strip()
            events += [] if is_rest_of_call else self._content(self._text)
        self._call, self._text = None, ""
        return [event for event in joined(events) if event != Content("")]

    def _char(self, char: str) -> Iterator[Event]:
        if self._call is not None:
            yield from self._call_char(self._call, char)
        elif self._is_closing:
            self._closing = (self._closing + char)[-len(CLOSE) :]
            if self._closing == CLOSE:
                self._is_closing, self._is_after_call, self._closing = False, True, ""
        else:
            yield from self._text_char(char)

    def _text_char(self, char: str) -> Iterator[Event]:
        self._text += char
        if self._text.endswith(OPEN):
            content = self._text[: -len(OPEN)]
            told = content.rstrip(_WHITE)
            self._before, self._text = content[len(told) :], ""
            self._call = _CallScanner()
            yield from self._content(told)
            return
        num_held = _held(self._text)
        told, self._text = self._text[: len(self._text) - num_held], self._text[len(self._text) - num_held :]
        yield from self._content(told)

    def _content(self, text: str) -> Iterator[Event]:
        if self._is_after_call:
            text = text.lstrip(_WHITE)
        if text:
            self._is_after_call = False
            yield Content(text)

    def _call_char(self, call: _CallScanner, char: str) -> Iterator[Event]:
        had_name = bool(call.name)
        arguments = call.feed(char)
        call.is_broken |= not call.name and len(call.raw) > MAX_NAMELESS_CHARS
        if call.is_broken and not had_name:
            # No call after all: its tag is content, and what came behind it is read again as text.
            self._call = None
            yield from self._content(self._before + OPEN)
            for again in call.raw:
                yield from self._char(again)
            return
        is_muted = self._only_first and self.num_calls > (1 if had_name else 0)
        if call.name and not had_name:
            self.num_calls += 0 if is_muted else 1
            call.k = self.num_calls - 1
            call.is_muted = is_muted
            if not is_muted:
                yield CallStarted(call.k, call.name)
        if arguments and not call.is_muted:
            yield CallArguments(call.k, arguments)
        if call.is_broken or call.is_done:
            self._call, self._is_closing, self._closing = None, True, ""


@dataclass(slots=True)
class _CallScanner:
    """Reads the JSON object of a call, character by character.

    Attributes:
        raw: everything read.
        name: "" until it is known.
    """

    raw: str = ""
    name: str = ""
    k: int = 0
    is_muted: bool = False
    is_broken: bool = False
    is_done: bool = False
    _state: str = "start"  # start, key or end, key, colon, value begins, value, comma or end
    _key: str = ""
    _value: str = ""
    _depth: int = 0
    _in_string: bool = False
    _is_escaped: bool = False
    _has_arguments: bool = False
    _waiting: list[str] = field(default_factory=list)  # arguments that came before the name

    def feed(self, char: str) -> str:
        """Arguments that may be told now."""
        self.raw += char
        if self._state in ("start", "key or end", "colon", "value begins", "comma or end") and char in _WHITE:
            return ""
        match self._state:
            case "start":
                return self._expect(char == "{", "key or end")
            case "key or end":
                if char == "}":
                    return self._end_object()
                self._key = '"'
                return self._expect(char == '"', "key")
            case "key":
                self._key += char
                if char == '"' and not self._is_escaped:
                    self._state = "colon"
                self._is_escaped = char == "\\" and not self._is_escaped
                return ""
            case "colon":
                return self._expect(char == ":", "value begins")
            case "value begins":
                self._value, self._depth, self._in_string, self._state = "", 0, False, "value"
                return self._value_char(char)
            case "value":
                return self._value_char(char)
            case _:
                return self._end_object() if char == "}" else self._expect(char == ",", "key or end")

    def _expect(self, is_right: bool, state: str) -> str:
        self.is_broken = not is_right
        self._state = state
        return ""

    def _value_char(self, char: str) -> str:
        if self._in_string:
            self._in_string = char != '"' or self._is_escaped
            self._is_escaped = char == "\\" and not self._is_escaped
            return self._keep(char, is_last=not self._in_string and not self._depth)
        if not self._depth and char in ",}]" + _WHITE:  # behind a number, true, false or null
            if not self._value:
                return self._expect(False, "value")
            told = self._value_ended()
            self._state = "comma or end"
            return told + (self._end_object() if char == "}" else self._expect(char not in "]", self._after(char)))
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            return self._keep(char, is_last=not self._depth)
        return self._keep(char, is_last=False)

    @staticmethod
    def _after(char: str) -> str:
        return "key or end" if char == "," else "comma or end"

    def _keep(self, char: str, *, is_last: bool) -> str:
        self._value += char
        told = ""
        if self._parsed_key() in _ARGUMENTS:
            self._has_arguments = True
            self._waiting.append(char)
            told = self._told_arguments()
        if is_last:
            self._state = "comma or end"
            told += self._value_ended()
        return told

    def _value_ended(self) -> str:
        if self._parsed_key() != "name" or self.name:
            return ""
        name = _parsed(self._value)
        if not isinstance(name, str) or not name:
            self.is_broken = True
            return ""
        self.name = name
        return self._told_arguments()

    def _told_arguments(self) -> str:
        if not self.name:
            return ""
        told, self._waiting = "".join(self._waiting), []
        return told

    def _end_object(self) -> str:
        self.is_done = bool(self.name)
        self.is_broken = not self.name
        return "" if self._has_arguments or not self.name else "{}"

    def _parsed_key(self) -> object:
        return self._key[1:-1] if "\\" not in self._key else _parsed(self._key)


def _parsed(text: str) -> object:
    try:
        parsed: object = json.loads(text)
    except ValueError:
        return None
    return parsed


def _held(text: str) -> int:
    """Length of the longest end of `text` that may become white space in front of a tag, or a part of the tag."""
    for length in range(min(len(text), len(OPEN) - 1), 0, -1):
        if OPEN.startswith(text[-length:]):
            return length + _num_white(text[:-length])
    return _num_white(text)


def _num_white(text: str) -> int:
    return len(text) - len(text.rstrip(_WHITE))


def joined(events: Iterator[Event] | list[Event]) -> Iterator[Event]:
    """The same, neighbours of one kind as one."""
    last: Event | None = None
    for event in events:
        match last, event:
            case Content(text), Content(more):
                last = Content(text + more)
            case CallArguments(k, text), CallArguments(other, more) if k == other:
                last = CallArguments(k, text + more)
            case _:
                if last is not None:
                    yield last
                last = event
    if last is not None:
        yield last
