"""Which fields a body may have: served, neutral only, ignored, or refused by name with what to use instead.

A field is never silently ignored when the answer would differ. The tables are the whole surface.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from webapp.errors import InvalidRequest
from webapp.openai.fields import Checker, shown, wrong_type

# Accepted, without an effect on the answer.
IGNORED: Final = frozenset(
    {"user", "session_id", "prompt_cache_key", "safety_identifier", "prompt_cache_retention", "prompt_cache_options"}
)
# Only these values pass (null always does); another asks for something that is not built.
NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "best_of": (),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "logprob_token_ids": (),
    "return_tokens_as_token_ids": (False,),
    "stream_interval": (1,),
    "cache_salt": (),
    "request_id": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "watermarking": (),
    "repetition_detection": (),
    "routed_experts_prompt_start": (),
    "ec_transfer_params": (),
    "prompt_embeds": (),
    "mm_processor_kwargs": (),
    "media_io_kwargs": (),
    "timeout": (),
    "store": (False,),
    "prediction": (),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "verbosity": ("medium",),
}
NEUTRAL_COMPLETION: Final[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}
NEUTRAL_CHAT: Final[dict[str, tuple[Any, ...]]] = {
    "echo": (False,),
    "chat_template": (),
    "documents": (),
    "reasoning_effort": (),
    "include_reasoning": (True,),
    "thinking_token_budget": (),
    "return_prompt_text": (False,),
    "functions": (),
    "function_call": (),
    "add_special_tokens": (False,),
}
HINTS: Final = {
    "timeout": "send the header x-request-timeout-ms",
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "guided_json": "use `structured_outputs` or `response_format`",
    "guided_regex": "use `structured_outputs`",
    "guided_choice": "use `structured_outputs`",
    "guided_grammar": "use `structured_outputs`",
    "guided_decoding_backend": "use `structured_outputs`",
    "guided_whitespace_pattern": "use `structured_outputs`",
    "request_id": "send the header x-request-id",
}
REFUSED: Final = frozenset(name for name in HINTS if name.startswith("guided_"))


@dataclass(frozen=True)
class Surface:
    """The fields of one endpoint. `served`: name to checker; values come out checked, null as absent."""

    served: Mapping[str, Checker]
    neutral: Mapping[str, tuple[Any, ...]]
    required: tuple[str, ...] = ()
    ignored: frozenset[str] = IGNORED

    def check(self, body: Mapping[str, Any]) -> Checked:
        """Every field of `body` once.

        Raises:
            InvalidRequest: with up to 10 problems at once.
        """
        values: dict[str, Any] = {}
        unknown: list[str] = []
        problems: list[InvalidRequest] = []
        for name in self.required:
            if body.get(name) is None:
                problems.append(InvalidRequest("missing_field", f"{name} is required", param=name))
        for name, value in body.items():
            try:
                if name in self.served:
                    if value is not None:
                        values[name] = self.served[name](value, name)
                elif name in self.neutral or name in REFUSED:
                    self._only_neutral(name, value, body)
                elif name not in self.ignored:
                    unknown.append(name)
                elif name == "user" and value is not None and not isinstance(value, str):
                    raise wrong_type(name, "a string", value)
            except InvalidRequest as problem:
                problems.append(problem)
        if problems:
            raise InvalidRequest.of(problems)
        return Checked(values, unknown, self)

    def closest(self, name: str) -> str:
        """`; did you mean 'x'?`, or nothing."""
        close = difflib.get_close_matches(name, [*self.served, *self.neutral], n=1)
        return f"; did you mean {close[0]!r}?" if close else ""

    def _only_neutral(self, name: str, value: Any, body: Mapping[str, Any]) -> None:
        if value is None or (name == "best_of" and value == body.get("n", 1)):
            return
        allowed = self.neutral.get(name, ())
        if any(value == good and isinstance(value, bool) == isinstance(good, bool) for good in allowed):
            return
        hint = f"; {HINTS[name]}" if name in HINTS else "; leave it out"
        what = shown(value) if isinstance(value, bool | int | float) else "a value"
        raise InvalidRequest("unsupported", f"{name} is not supported (got {what}){hint}", param=name)


@dataclass(frozen=True)
class Checked:
    """Checked values, and the names that no table knows."""

    values: dict[str, Any]
    unknown: list[str]
    surface: Surface = field(repr=False)

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    def settle_unknown(self, policy: str) -> list[str]:
        """Names to tell in `x-ignored-fields`; under the policy "reject" an error instead.

        Raises:
            InvalidRequest: `unknown_field`.
        """
        if self.unknown and policy == "reject":
            raise InvalidRequest.of(
                [
                    InvalidRequest("unknown_field", f"{n[:100]} is not a known field{self.surface.closest(n)}", param=n)
                    for n in self.unknown
                ]
            )
        return self.unknown
