"""Logprobs as each endpoint tells them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from engines.tokenizer import Tokenizer
from webapp.openai.pieces import PieceToken

_LOWEST: Final = -9999.0  # JSON has no -inf


def finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    """The token as text; bytes that are no whole character come as U+FFFD."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "replace")


def chat_logprobs(tokens: Sequence[PieceToken], top: int | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    """`logprobs` of a chat choice or chunk; None where none were asked for."""
    if top is None:
        return None
    content = []
    for token in tokens:
        if token.logprobs is None:
            continue
        alternatives = [_chat_token(i, value, tokenizer) for i, value in token.logprobs.top[:top]]
        chosen = _chat_token(token.token_id, token.logprobs.logprob, tokenizer)
        content.append({**chosen, "top_logprobs": alternatives})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[PieceToken], top: int | None, tokenizer: Tokenizer, *, offset: int
) -> dict[str, Any] | None:
    """`logprobs` of a completion. `offset`: characters of the returned text before these tokens."""
    if top is None:
        return None
    names: list[str] = []
    values: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for token in tokens:
        if token.logprobs is not None:
            name = token_name(tokenizer, token.token_id)
            value = finite(token.logprobs.logprob)
            best = {token_name(tokenizer, i): finite(v) for i, v in token.logprobs.top[:top]}
            names.append(name)
            values.append(value)
            tops.append({**best, name: value})
            offsets.append(offset)
        offset += len(token.text)
    return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}


def _chat_token(token_id: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "token": token_name(tokenizer, token_id),
        "logprob": finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
