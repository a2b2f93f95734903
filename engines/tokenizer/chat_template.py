"""A model's chat template: Jinja in a sandbox, with limits on time and size.

The same names and filters as `transformers` gives templates: `raise_exception`, `strftime_now`, `tojson` without HTML
escapes, loop controls, `{% generation %}` (which marks nothing here). Templates come with models from the internet, so
loops and calls look at a clock, and strings that multiply are bounded.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engines.tokenizer.errors import ChatTemplateError

MAX_TEMPLATE_CHARS: Final = 1 << 20
MAX_RENDERED_CHARS: Final = 32 << 20
MAX_RENDER_S: Final = 5.0

_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "
_deadline_s: ContextVar[float] = ContextVar("_deadline_s", default=float("inf"))


class ChatTemplate:
    """A compiled template. Thread-safe."""

    def __init__(self, source: str, *, max_render_s: float = MAX_RENDER_S) -> None:
        """Compile.

        Raises:
            ChatTemplateError: too long, or not Jinja.
        """
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE_CHARS} are accepted"
            )
        self.source = source
        self._max_render_s = max_render_s
        try:
            self._template = _Environment().from_string(source)
        except TemplateError as error:
            line = getattr(error, "lineno", None)
            place = f" (line {line})" if line else ""
            raise ChatTemplateError(f"the chat template is not valid Jinja{place}: {error.message}") from error

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """Text of a conversation of plain JSON values.

        Keys of messages whose value is None are left out, as `transformers` does: many templates print them.

        Raises:
            ChatTemplateError: the template refused the conversation, failed on it, or took too long.
        """
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if continue_final_message:
            _tag_final_message(chat)
        text = self._run({**(variables or {}), "messages": chat, "tools": tools, "documents": None,
                          "add_generation_prompt": add_generation_prompt})  # fmt: skip
        return _cut_at_tag(text) if continue_final_message else text

    def _run(self, variables: dict[str, Any]) -> str:
        token = _deadline_s.set(time.monotonic() + self._max_render_s)
        try:
            parts: list[str] = []
            num_chars = 0
            for part in self._template.generate(**variables):
                parts.append(part)
                num_chars += len(part)
                _check_size(num_chars)
            return "".join(parts)
        except (ChatTemplateError, MemoryError):
            raise
        except SecurityError as error:
            raise ChatTemplateError(f"the chat template left its sandbox: {error.message}") from error
        except Exception as error:  # templates run arbitrary expressions: TypeError, KeyError, OverflowError, ...
            raise ChatTemplateError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}"
            ) from error
        finally:
            _deadline_s.reset(token)


def _tag_final_message(chat: list[dict[str, Any]]) -> None:
    """Put a tag after the text to be continued, to find the place again in the rendered text."""
    content = chat[-1].get("content") if chat else None
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
        return
    for k in reversed(range(len(content)) if isinstance(content, list) else ()):
        if isinstance(content, list) and isinstance(content[k], dict) and "text" in content[k]:
            part = {**content[k], "text": content[k]["text"] + _CONTINUE_TAG}
            chat[-1]["content"] = [*content[:k], part, *content[k + 1 :]]
            return
    raise ChatTemplateError("continue_final_message needs a final message with text to continue")


def _cut_at_tag(text: str) -> str:
    place = text.rfind(_CONTINUE_TAG.strip())
    if place < 0:
        raise ChatTemplateError("the chat template does not show the final message, so it cannot be continued")
    # A template that trims contents took the tag's space as well; then the text's own end was trimmed, too.
    return text[:place] if text.startswith(_CONTINUE_TAG, place) else text[:place].rstrip()


def _check_time() -> None:
    if time.monotonic() > _deadline_s.get():
        raise ChatTemplateError("the chat template took too long and was stopped")


def _check_size(num_chars: int) -> None:
    if num_chars > MAX_RENDERED_CHARS:
        raise ChatTemplateError(f"the chat template made a text of more than {MAX_RENDERED_CHARS} characters")


class _Environment(ImmutableSandboxedEnvironment):
    """Sandbox whose loops, calls and repetitions are bounded."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols])
        self.filters["tojson"] = _to_json
        self.filters[_CLOCKED] = _clocked
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: datetime.now().strftime(pattern),
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _CLOCKED, [], [], None, None, lineno=loop.lineno)
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # Jinja's own signature: template variables may be called `self` and `context`.
        _check_time()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for text, count in ((left, right), (right, left)):
                if isinstance(text, str | list | tuple) and isinstance(count, int):
                    _check_size(len(text) * count)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check_size(len(left) + len(right))
        elif operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise ChatTemplateError("the chat template computes a power with an exponent over 64")
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise ChatTemplateError("the chat template formats a string with a width of more than 4 digits")
        return super().call_binop(context, operator, left, right)


_CLOCKED = "_clocked"
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{5}|\*)")


def _clocked(items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _raise_exception(message: object) -> None:
    raise ChatTemplateError(str(message), raised_by_template=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML characters; models were trained on plain JSON."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _TemplateDict:
    """`dict(...)` for templates, without the attributes of the class `dict`."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _TemplateNamespace(Namespace):
    """`namespace(...)` for templates, without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace attribute may not begin with an underscore: {name!r}")


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's words, for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
