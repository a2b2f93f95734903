"""Tool calls read out of text: the same for every way of cutting it, and nothing told that must be taken back."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from webapp.openai.tool_calls import CallArguments, CallStarted, Content, Event, ToolCallParser

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
PIECES = st.sampled_from(
    ["<tool_call>", "</tool_call>", "<tool_", '{"name": "f"', ', "arguments": ', '{"a": "}\\"{"}', "}", "{", '"name":',
     '"g"', ",", " ", "\n", "text", "[1, 2]", "null", "12", '"arguments":{}', "é", "<"]
)  # fmt: skip


def _joined(events: list[Event]) -> list[Event]:
    out: list[Event] = []
    for event in events:
        last = out[-1] if out else None
        if isinstance(last, Content) and isinstance(event, Content):
            out[-1] = Content(last.text + event.text)
        elif isinstance(last, CallArguments) and isinstance(event, CallArguments) and last.k == event.k:
            out[-1] = CallArguments(last.k, last.text + event.text)
        else:
            out.append(event)
    return out


def _read(text: str, cuts: list[int] | None = None, *, only_first: bool = False) -> list[Event]:
    parser = ToolCallParser(only_first=only_first)
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    events = [event for lo, hi in itertools.pairwise(places) for event in parser.feed(text[lo:hi])]
    return _joined([*events, *parser.end()])


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("plain text \n", [Content("plain text \n")]),
        (WEATHER, [CallStarted(0, "get_weather"), CallArguments(0, '{"city": "Paris"}')]),
        (
            f"Sure.\n{WEATHER}\n{WEATHER}\n",
            [
                Content("Sure."),
                CallStarted(0, "get_weather"),
                CallArguments(0, '{"city": "Paris"}'),
                CallStarted(1, "get_weather"),
                CallArguments(1, '{"city": "Paris"}'),
            ],
        ),
        (f"{WEATHER}\n done", [CallStarted(0, "get_weather"), CallArguments(0, '{"city": "Paris"}'), Content("done")]),
        (
            '<tool_call>{"arguments": {"a": "}\\"{"}, "name": "f"}</tool_call>',
            [CallStarted(0, "f"), CallArguments(0, '{"a": "}\\"{"}')],
        ),
        ('<tool_call>{"name": "f"}</tool_call>', [CallStarted(0, "f"), CallArguments(0, "{}")]),
        (
            '<tool_call>{"name": "f", "id": 3, "parameters": {"x": [1]}}',
            [CallStarted(0, "f"), CallArguments(0, '{"x": [1]}')],
        ),
        ('<tool_call>{"name": "f", "arguments": {"a": "cut', [CallStarted(0, "f"), CallArguments(0, '{"a": "cut')]),
        ('<tool_call>{"name": "f', [Content('<tool_call>{"name": "f')]),
        ("<tool_call>no json</tool_call>", [Content("<tool_call>no json</tool_call>")]),
        ('<tool_call>{"name": 3}</tool_call>', [Content('<tool_call>{"name": 3}</tool_call>')]),
        (
            f"<tool_call>{WEATHER}",
            [Content("<tool_call>"), CallStarted(0, "get_weather"), CallArguments(0, '{"city": "Paris"}')],
        ),
        ("a <tool_ca", [Content("a <tool_ca")]),
        ("", []),
    ],
)  # fmt: skip
def test_calls_and_content_come_apart(text: str, events: list[Event]) -> None:
    assert _read(text) == events


def test_only_the_first_call_is_told_without_parallel_calls() -> None:
    assert _read(f"{WEATHER}\n{WEATHER}", only_first=True) == _read(WEATHER)


@given(st.lists(PIECES, max_size=14).map("".join), st.lists(st.integers(0, 400), max_size=12), st.booleans())
def test_every_way_of_cutting_gives_the_same(text: str, cuts: list[int], only_first: bool) -> None:
    assert _read(text, cuts, only_first=only_first) == _read(text, only_first=only_first)


@given(
    st.dictionaries(st.text(max_size=5), st.one_of(st.text(max_size=8), st.integers(), st.lists(st.none()))),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_arguments_are_told_as_the_model_wrote_them(arguments: dict[str, object], cuts: list[int]) -> None:
    written = json.dumps(arguments, ensure_ascii=False)
    text = f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'
    assert _read(text, cuts) == [CallStarted(0, "f"), CallArguments(0, written)]


def test_a_long_text_of_open_tags_is_read_in_bounded_depth() -> None:
    text = '<tool_call>{"' * 2_000
    events = _read(text)
    assert events == [Content(text)]
