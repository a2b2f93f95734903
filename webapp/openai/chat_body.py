"""The body of POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from engines.tokenizer import ChatTemplateError
from webapp.errors import InvalidRequest
from webapp.openai.call import Call, CallNotes, Prompt
from webapp.openai.completion_body import check_bytes
from webapp.openai.fields import Boolean, Integer, wrong_type
from webapp.openai.messages import check_messages
from webapp.openai.prompt_limits import bad_word_ids, truncated
from webapp.openai.prompt_logprobs import check_size, num_to_compute
from webapp.openai.sampling import check_prompt_logprobs, check_stream_options, sampling_params, shared_fields
from webapp.openai.served_model import ServedModel
from webapp.openai.structured import (
    check_compiles,
    check_response_format,
    check_structured_outputs,
    output_constraint,
)
from webapp.openai.surface import NEUTRAL, NEUTRAL_CHAT, Checked, Surface
from webapp.openai.tools import check_tool_choice, check_tools, text_of, tool_use, with_calls

MAX_TOP_LOGPROBS: Final = 20
_OUR_VARIABLES: Final = {
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
}
_MAX_TOKENS: Final = Integer(1, 2**63 - 1, "at least 1")


def chat_surface(vocab_size: int) -> Surface:
    """The fields of this endpoint."""
    served = shared_fields(vocab_size) | {
        "messages": check_messages,
        "max_tokens": _MAX_TOKENS,
        "max_completion_tokens": _MAX_TOKENS,
        "logprobs": Boolean(),
        "top_logprobs": Integer(0, MAX_TOP_LOGPROBS),
        "add_generation_prompt": Boolean(),
        "continue_final_message": Boolean(),
        "chat_template_kwargs": _template_kwargs,
        "response_format": check_response_format,
        "structured_outputs": check_structured_outputs,
        "tools": check_tools,
        "tool_choice": check_tool_choice,
        "parallel_tool_calls": Boolean(),
    }
    return Surface(served, NEUTRAL | NEUTRAL_CHAT, required=("messages",))


def parse_chat(body: Mapping[str, Any], model: ServedModel, *, unknown_fields: str) -> Call:
    """Checks everything and renders the chat template.

    Raises:
        ApiError: with the field's path.
    """
    model.check_name(body.get("model"))
    checked = chat_surface(model.tokenizer.vocab_size).check(body)
    ignored = checked.settle_unknown(unknown_fields)
    if "top_logprobs" in checked.values and not checked.get("logprobs", False):
        raise InvalidRequest("conflict_fields", "top_logprobs needs logprobs: true", param="top_logprobs")
    options = check_stream_options(checked)
    check_prompt_logprobs(checked)
    use = tool_use(checked)
    structured = with_calls(output_constraint(checked), use, checked)
    started_s = time.monotonic()
    ids = render_chat(checked, model)
    tokenize_ms = (time.monotonic() - started_s) * 1000
    asked = checked.values.get("max_completion_tokens", checked.values.get("max_tokens"))
    name = "max_completion_tokens" if "max_completion_tokens" in checked.values else "max_tokens"
    ids = truncated(ids, checked, max_tokens=asked, max_model_len=model.max_model_len)
    max_tokens = model.check_length(len(ids), asked, param=name)
    logprobs = checked.get("top_logprobs", 0) if checked.get("logprobs", False) else None
    vocab_size = model.tokenizer.vocab_size
    num_top = num_to_compute(checked.values.get("prompt_logprobs"), None, vocab_size=vocab_size)
    check_size(num_top, [ids], checked.get("n", 1))
    params = sampling_params(
        checked,
        max_tokens=max_tokens,
        logprobs=logprobs,
        vocab_size=vocab_size,
        prompt_logprobs=num_top,
        bad_word_ids=bad_word_ids(checked.get("bad_words", []), model.tokenizer),
        constraint=check_compiles(structured, model),
    )
    notes = CallNotes(
        api="chat",
        created=int(time.time()),
        top_logprobs=logprobs,
        prompt_logprobs=checked.values.get("prompt_logprobs"),
        tools=use.mode,
        only_first_call=use.only_first_call,
        return_token_ids=checked.get("return_token_ids", False),
        include_usage=options["include_usage"],
        continuous_usage_stats=options["continuous_usage_stats"],
        metadata=checked.get("metadata", {}),
        tokenize_ms=tokenize_ms,
    )
    return Call(
        notes=notes,
        prompts=[Prompt(token_ids=ids)],
        params=[params],
        stream=checked.get("stream", False),
        include_event_ids=options["include_event_ids"],
        seed=checked.values.get("seed"),
        priority=checked.get("priority", 0),
        ignored_fields=ignored,
    )


def render_chat(checked: Checked, model: ServedModel) -> list[int]:
    """Token ids of the messages.

    Raises:
        InvalidRequest: the template refuses them (its own words), or they cannot fit.
    """
    messages: list[dict[str, Any]] = checked.get("messages", [])
    continues = checked.get("continue_final_message", False)
    adds = checked.get("add_generation_prompt", not continues)
    if continues and adds:
        clash = "continue_final_message and add_generation_prompt must not both be true"
        raise InvalidRequest("conflict_fields", clash, param="continue_final_message")
    if not model.tokenizer.has_chat_template:
        raise InvalidRequest("unsupported", f"model {model.name} has no chat template; use /v1/completions")
    for i, message in enumerate(messages):
        check_bytes(message["content"], f"messages[{i}].content", model)
    tools = tool_use(checked).shown
    check_bytes(text_of(tools), "tools", model)
    try:
        ids = model.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=adds,
            continue_final_message=continues,
            **checked.get("chat_template_kwargs", {}),
        )
    except ChatTemplateError as error:
        refusal = f"the model's chat template refuses these messages: {str(error)[:500]}"
        raise InvalidRequest("invalid_value", refusal, param="messages") from error
    if not ids:
        raise InvalidRequest("invalid_value", "messages must give at least one token", param="messages")
    return ids


def _template_kwargs(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    for name in value:
        if name in _OUR_VARIABLES or not name.isidentifier():
            where = f"{path}.{name[:100]}"
            raise InvalidRequest("invalid_value", f"{where} must not be set here", param=where)
    return value
