"""Logprobs of the prompt: who asked for them, how large an answer they may make, and how each endpoint tells them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final

from engines.params import SamplingParams
from engines.tokenizer import TextStream, Tokenizer
from kvstore.state.entries import PromptLogprobs
from webapp.errors import InvalidRequest, StreamFailed
from webapp.openai.call import Prompt
from webapp.openai.logprobs import finite, token_name

MAX_VALUES: Final = 400_000  # about 25 MB of JSON
Json = dict[str, Any]


def num_to_compute(asked: int | None, echoed: int | None, *, vocab_size: int) -> int | None:
    """Alternatives per prompt token for `prompt_logprobs` (-1: the whole vocabulary) and for `echo` with `logprobs`."""
    wanted = [vocab_size if count == -1 else count for count in (asked, echoed) if count is not None]
    return max(wanted) if wanted else None


def check_size(num_top: int | None, prompts: Sequence[list[int]], n: int) -> None:
    """Each choice carries the logprobs of its prompt; all of them have to fit an answer.

    Raises:
        InvalidRequest: `out_of_range`.
    """
    if num_top is None:
        return
    num_values = sum(map(len, prompts)) * (num_top + 1) * n
    if num_values > MAX_VALUES:
        message = (
            f"logprobs of the prompt would be {num_values} values, at most {MAX_VALUES} fit an answer; ask for fewer "
            "alternatives, a shorter prompt or a smaller n"
        )
        raise InvalidRequest("out_of_range", message, param="prompt_logprobs")


def known(logprobs: PromptLogprobs | None, rid: str) -> PromptLogprobs:
    """What was asked for and has to be there.

    Raises:
        StreamFailed: the part of the log that held them is lost.
    """
    if logprobs is None:
        message = f"the prompt's logprobs of request {rid} were lost with a part of its log; send it again"
        raise StreamFailed(502, "upstream_failed", message)
    return logprobs


def prompt_logprobs(logprobs: PromptLogprobs, prompt: Prompt, tokenizer: Tokenizer, num_top: int) -> list[Json | None]:
    """vLLM's form: null for the first token, then id -> logprob, rank and text of the token and of the best."""
    table = _Table(logprobs)
    told: list[Json | None] = [None]
    for i, token_id in enumerate(prompt.token_ids[1:]):
        entry = {token_id: _ranked(table.logprobs[i], table.ranks[i], token_name(tokenizer, token_id))}
        for rank, (best, value) in enumerate(table.best(i, num_top), start=1):
            entry.setdefault(best, _ranked(value, rank, token_name(tokenizer, best)))
        told.append({str(key): value for key, value in entry.items()})
    return told


def echoed_logprobs(logprobs: PromptLogprobs, prompt: Prompt, tokenizer: Tokenizer, num_top: int) -> Json:
    """The `logprobs` of an echoed prompt; of the first token they are null."""
    table = _Table(logprobs)
    names = [token_name(tokenizer, token_id) for token_id in prompt.token_ids]
    tops: list[Json | None] = [None]
    for i, name in enumerate(names[1:]):
        best = {token_name(tokenizer, token): finite(value) for token, value in table.best(i, num_top)}
        tops.append({**best, name: finite(table.logprobs[i])})
    return {
        "tokens": names,
        "token_logprobs": [None, *map(finite, table.logprobs)],
        "top_logprobs": tops,
        "text_offset": _offsets(prompt, tokenizer),
    }


def _offsets(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """Where each token begins in the echoed text; one that the text does not show, where the next one does."""
    shows_special = tokenizer.decode(prompt.token_ids, False) == prompt.echo
    stream = TextStream(tokenizer, SamplingParams(ignore_eos=True, skip_special_tokens=not shows_special))
    offsets, offset = [], 0
    for token_id in prompt.token_ids:
        offsets.append(min(offset, len(prompt.echo)))
        offset += len(stream.push(token_id))
    return offsets


def _ranked(logprob: float, rank: int, text: str) -> Json:
    return {"logprob": finite(logprob), "rank": rank, "decoded_token": text}


class _Table:
    """The packed arrays, unpacked."""

    def __init__(self, packed: PromptLogprobs) -> None:
        self.logprobs = array("f", packed.logprobs)
        self.ranks = array("i", packed.ranks)
        self._ids = array("i", packed.top_ids)
        self._values = array("f", packed.top_logprobs)
        self._width = len(self._ids) // len(self.logprobs) if self.logprobs else 0

    def best(self, i: int, count: int) -> list[tuple[int, float]]:
        lo = i * self._width
        hi = lo + min(count, self._width)
        return list(zip(self._ids[lo:hi], self._values[lo:hi], strict=True))
