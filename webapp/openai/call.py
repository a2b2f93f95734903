"""One checked API call: what will be accepted, and what its answer needs later.

`CallNotes` travels in the record (`meta`), so that any gateway can go on with the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from engines.params import SamplingParams


class CallNotes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the answer of a request is written.

    Attributes:
        api: "chat" or "completion".
        num_prompts: prompts of the call; this record is that of `prompt_index`.
        echo: text in front of each choice.
        echo_logprobs: the echoed text comes with its logprobs.
        top_logprobs: alternatives to tell per token; None: no logprobs at all.
        prompt_logprobs: alternatives to tell per prompt token, -1 is all; None: none were asked for.
        tools: how tool calls are read out of the text: "auto", "required", "named"; "" leaves the text alone.
        only_first_call: later calls of a choice are dropped (`parallel_tool_calls: false`).
        only_prompt: `max_tokens` was 0; the one token that had to be computed is not told.
    """

    api: str
    created: int
    prompt_index: int = 0
    num_prompts: int = 1
    echo: str = ""
    echo_logprobs: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    only_prompt: bool = False
    tools: str = ""
    only_first_call: bool = False
    return_token_ids: bool = False
    include_usage: bool = False
    continuous_usage_stats: bool = False
    metadata: dict[str, str] = {}
    tokenize_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids of one prompt, its text if it came as text, and what stands in front of each choice."""

    token_ids: list[int]
    text: str = ""
    echo: str = ""


@dataclass(frozen=True, kw_only=True)
class Call:
    """A call that can be accepted: one request per prompt, `params.n` choices each."""

    notes: CallNotes
    prompts: list[Prompt]
    params: list[SamplingParams]  # per prompt: the rest of the context differs
    stream: bool
    include_event_ids: bool = False
    seed: int | None = None
    priority: int = 0
    ignored_fields: list[str] = field(default_factory=list)

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.params[0].n
