"""Fields that completions and chat share, and the sampling parameters they make."""

from __future__ import annotations

from typing import Any, Final

from engines.params import SamplingParams
from engines.structured import Constraint
from webapp.errors import InvalidRequest
from webapp.openai.fields import (
    Boolean,
    Checker,
    Integer,
    ListOf,
    LogitBias,
    Metadata,
    Number,
    OneOf,
    Stop,
    out_of_range,
    wrong_type,
)
from webapp.openai.prompt_limits import check_allowed, check_bad_words, check_something_is_left
from webapp.openai.surface import Checked

MAX_N: Final = 128
MAX_PROMPT_LOGPROBS: Final = 20
_INT64: Final = 2**63


def shared_fields(vocab_size: int) -> dict[str, Checker]:
    """Checkers of the fields of both endpoints. `model` and the prompt are checked apart."""
    return {
        "model": lambda value, _path: value,
        "frequency_penalty": Number(-2, 2),
        "presence_penalty": Number(-2, 2),
        "logit_bias": LogitBias(vocab_size),
        "n": Integer(1, MAX_N),
        "seed": Integer(-_INT64, _INT64 - 1, "an integer that fits in a signed 64-bit integer"),
        "stop": Stop(),
        "stream": Boolean(),
        "stream_options": _stream_options,
        "temperature": Number(0, 2),
        "top_p": Number(0, 1, open_low=True),
        "top_k": Integer(-1, 2**63 - 1, "-1 or 0 (off), or at least 1"),
        "min_p": Number(0, 1),
        "repetition_penalty": Number(0, 1e4, open_low=True),
        "min_tokens": Integer(0, _INT64 - 1),
        "stop_token_ids": ListOf(Integer(0, vocab_size - 1), 256),
        "ignore_eos": Boolean(),
        "include_stop_str_in_output": Boolean(),
        "skip_special_tokens": Boolean(),
        "metadata": Metadata(),
        "priority": Integer(-_INT64, _INT64 - 1),
        "return_token_ids": Boolean(),
        "allowed_token_ids": check_allowed(vocab_size),
        "bad_words": check_bad_words,
        "truncate_prompt_tokens": Integer(-1, _INT64 - 1, "-1, or at least 1"),
        "truncation_side": OneOf(("left", "right")),
        "prompt_logprobs": Integer(-1, MAX_PROMPT_LOGPROBS, f"-1 (the whole vocabulary), or 0..{MAX_PROMPT_LOGPROBS}"),
    }


def sampling_params(
    checked: Checked,
    *,
    max_tokens: int,
    logprobs: int | None,
    vocab_size: int,
    prompt_logprobs: int | None = None,
    bad_word_ids: tuple[tuple[int, ...], ...] = (),
    constraint: Constraint | None = None,
) -> SamplingParams:
    """The parameters of one request.

    Raises:
        InvalidRequest: `conflict_fields` where two fields contradict each other.
    """
    allowed = checked.get("allowed_token_ids", [])
    check_something_is_left(allowed, bad_word_ids)
    min_tokens = checked.get("min_tokens", 0)
    if min_tokens > max_tokens:
        message = f"min_tokens ({min_tokens}) must not be above max_tokens ({max_tokens})"
        raise InvalidRequest("conflict_fields", message, param="min_tokens")
    temperature = checked.get("temperature", 1.0)
    top_k = max(0, checked.get("top_k", 0))
    return SamplingParams(
        n=checked.get("n", 1),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=0.0 if temperature < 1e-5 else temperature,
        top_p=checked.get("top_p", 1.0),
        top_k=0 if top_k >= vocab_size else top_k,
        min_p=checked.get("min_p", 0.0),
        frequency_penalty=checked.get("frequency_penalty", 0.0),
        presence_penalty=checked.get("presence_penalty", 0.0),
        repetition_penalty=checked.get("repetition_penalty", 1.0),
        logit_bias=checked.get("logit_bias", {}),
        stop=checked.get("stop", ()),
        stop_token_ids=tuple(checked.get("stop_token_ids", ())),
        ignore_eos=checked.get("ignore_eos", False),
        include_stop_str_in_output=checked.get("include_stop_str_in_output", False),
        skip_special_tokens=checked.get("skip_special_tokens", True),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        allowed_token_ids=tuple(dict.fromkeys(allowed)),
        bad_word_ids=bad_word_ids,
        constraint=constraint,
    )


def check_stream_options(checked: Checked) -> dict[str, bool]:
    """The stream options, all of them filled in.

    Raises:
        InvalidRequest: given without `stream: true`.
    """
    if "stream_options" in checked.values and not checked.get("stream", False):
        raise InvalidRequest("conflict_fields", "stream_options needs stream: true", param="stream_options")
    options: dict[str, bool] = checked.get("stream_options", {})
    return {"include_usage": False, "continuous_usage_stats": False, "include_event_ids": False, **options}


def check_prompt_logprobs(checked: Checked) -> None:
    """A stream has no place for them (the echo of a prompt has: `echo` with `logprobs`).

    Raises:
        InvalidRequest: `prompt_logprobs` with `stream: true`.
    """
    if "prompt_logprobs" in checked.values and checked.get("stream", False):
        message = "prompt_logprobs needs stream: false; in a stream, echo with logprobs tells those of the prompt"
        raise InvalidRequest("conflict_fields", message, param="prompt_logprobs")


def _stream_options(value: Any, path: str) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise wrong_type(path, "an object", value)
    known = {"include_usage", "continuous_usage_stats", "include_event_ids", "include_obfuscation"}
    options: dict[str, bool] = {}
    for name, option in value.items():
        if name not in known:
            raise InvalidRequest("unknown_field", f"{path}.{name[:100]} is not a known option", param=f"{path}.{name}")
        if option is not None:
            options[name] = Boolean()(option, f"{path}.{name}")
    return options


def check_num_sequences(num_prompts: int, n: int, *, limit: int) -> None:
    """At most `limit` choices in one call.

    Raises:
        InvalidRequest: `out_of_range`.
    """
    if num_prompts * n > limit:
        raise out_of_range("n", f"such that prompts x n is at most {limit}", num_prompts * n)
