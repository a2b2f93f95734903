"""The body of POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Final

from webapp.errors import InvalidRequest
from webapp.openai.call import Call, CallNotes, Prompt
from webapp.openai.fields import Boolean, Integer, Text, out_of_range, wrong_type
from webapp.openai.prompt_limits import bad_word_ids, truncated
from webapp.openai.prompt_logprobs import check_size, num_to_compute
from webapp.openai.sampling import (
    check_num_sequences,
    check_prompt_logprobs,
    check_stream_options,
    sampling_params,
    shared_fields,
)
from webapp.openai.served_model import ServedModel
from webapp.openai.structured import (
    check_compiles,
    check_response_format,
    check_structured_outputs,
    output_constraint,
)
from webapp.openai.surface import NEUTRAL, NEUTRAL_COMPLETION, Surface

MAX_PROMPTS: Final = 128
MAX_CHOICES: Final = 128
MAX_LOGPROBS: Final = 20
DEFAULT_MAX_TOKENS: Final = 16


def completion_surface(vocab_size: int) -> Surface:
    """The fields of this endpoint."""
    served = shared_fields(vocab_size) | {
        "prompt": lambda value, _path: value,
        "max_tokens": Integer(0, 2**63 - 1, "at least 1 (or 0 with echo)"),
        "echo": Boolean(),
        "logprobs": Integer(0, MAX_LOGPROBS),
        "add_special_tokens": Boolean(),
        "response_format": check_response_format,
        "structured_outputs": check_structured_outputs,
    }
    return Surface(served, NEUTRAL | NEUTRAL_COMPLETION, required=("prompt",))


def parse_completion(body: Mapping[str, Any], model: ServedModel, *, unknown_fields: str) -> Call:
    """Checks everything; afterwards nothing can be wrong with the call.

    Raises:
        ApiError: with the field's path.
    """
    model.check_name(body.get("model"))
    vocab_size = model.tokenizer.vocab_size
    checked = completion_surface(vocab_size).check(body)
    ignored = checked.settle_unknown(unknown_fields)
    echo = checked.get("echo", False)
    logprobs = checked.values.get("logprobs")
    max_tokens = checked.get("max_tokens", DEFAULT_MAX_TOKENS)
    if max_tokens < 1 and not echo:
        raise out_of_range("max_tokens", "at least 1 (0 only with echo)", max_tokens)
    options = check_stream_options(checked)
    check_prompt_logprobs(checked)

    started_s = time.monotonic()
    prompts = [_tokenized(p, path, checked.get("add_special_tokens", True), model) for p, path in _prompts(body)]
    tokenize_ms = (time.monotonic() - started_s) * 1000
    check_num_sequences(len(prompts), checked.get("n", 1), limit=MAX_CHOICES)
    for i, prompt in enumerate(prompts):
        ids = truncated(prompt.token_ids, checked, max_tokens=max_tokens, max_model_len=model.max_model_len)
        if len(ids) != len(prompt.token_ids):
            prompts[i] = Prompt(token_ids=ids)
        model.check_length(len(ids), max_tokens or None, param="max_tokens")
    if echo:
        decode = model.tokenizer.decode
        prompts = [Prompt(token_ids=p.token_ids, echo=p.text or decode(p.token_ids, False)) for p in prompts]
    asked = checked.values.get("prompt_logprobs")
    num_top = num_to_compute(asked, logprobs if echo else None, vocab_size=vocab_size)
    check_size(num_top, [prompt.token_ids for prompt in prompts], checked.get("n", 1))
    only_prompt = max_tokens == 0 and num_top is not None
    params = sampling_params(
        checked,
        max_tokens=1 if only_prompt else max_tokens,
        logprobs=logprobs,
        vocab_size=vocab_size,
        prompt_logprobs=num_top,
        bad_word_ids=bad_word_ids(checked.get("bad_words", []), model.tokenizer),
        constraint=check_compiles(output_constraint(checked), model),
    )
    notes = CallNotes(
        api="completion",
        created=int(time.time()),
        num_prompts=len(prompts),
        echo_logprobs=echo and logprobs is not None,
        top_logprobs=logprobs,
        prompt_logprobs=asked,
        only_prompt=only_prompt,
        return_token_ids=checked.get("return_token_ids", False),
        include_usage=options["include_usage"],
        continuous_usage_stats=options["continuous_usage_stats"],
        metadata=checked.get("metadata", {}),
        tokenize_ms=tokenize_ms,
    )
    return Call(
        notes=notes,
        prompts=prompts,
        params=[params] * len(prompts),
        stream=checked.get("stream", False),
        include_event_ids=options["include_event_ids"],
        seed=checked.values.get("seed"),
        priority=checked.get("priority", 0),
        ignored_fields=ignored,
    )


def _prompts(body: Mapping[str, Any]) -> list[tuple[str | list[int], str]]:
    """The four forms as a list of (text or ids, path)."""
    value = body["prompt"]
    if isinstance(value, str):
        return [(value, "prompt")]
    if not isinstance(value, list):
        raise wrong_type("prompt", "a string, an array of strings, of token ids, or of arrays of token ids", value)
    if not value:
        raise _empty("prompt")
    if isinstance(value[0], str | list):
        kind = type(value[0])
        if len(value) > MAX_PROMPTS:
            raise out_of_range("prompt", f"at most {MAX_PROMPTS} prompts", len(value))
        for i, item in enumerate(value):
            if not isinstance(item, kind):
                raise wrong_type(f"prompt[{i}]", "of the same kind as prompt[0]", item)
        return [(item, f"prompt[{i}]") for i, item in enumerate(value)]
    return [(value, "prompt")]


def _tokenized(prompt: str | list[int], path: str, add_special_tokens: bool, model: ServedModel) -> Prompt:
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        Text()(prompt, path)
        check_bytes(prompt, path, model)
        ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if not ids:
            raise _empty(path)
        return Prompt(token_ids=ids, text=prompt)
    if not prompt:
        raise _empty(path)
    return Prompt(token_ids=check_token_ids(prompt, path, tokenizer.vocab_size))


def check_token_ids(ids: list[Any], path: str, vocab_size: int) -> list[int]:
    """Token ids that exist in the tokenizer: an id beyond it would index outside of the embedding.

    Raises:
        InvalidRequest: with the path of the first bad one.
    """
    if all(type(i) is int and 0 <= i < vocab_size for i in ids):
        return list(ids)
    check = Integer(0, vocab_size - 1, f"token ids in 0..{vocab_size - 1}")
    return [_one_id(check, token_id, f"{path}[{i}]") for i, token_id in enumerate(ids)]


def check_bytes(text: str, path: str, model: ServedModel) -> None:
    """Refuses what cannot fit the context before time is spent on tokenising it.

    Raises:
        InvalidRequest: `context_length_exceeded`.
    """
    limit = model.max_model_len * model.longest_token_bytes
    if len(text) > limit:
        message = f"{path} has {len(text)} characters; the context of {model.max_model_len} tokens cannot hold them"
        raise InvalidRequest("context_length_exceeded", message, param=path)


def _one_id(check: Integer, token_id: Any, path: str) -> int:
    if isinstance(token_id, float):
        raise wrong_type(path, "an integer", token_id)
    return check(token_id, path)


def _empty(path: str) -> InvalidRequest:
    return InvalidRequest("invalid_value", f"{path} must contain at least one token", param=path)
