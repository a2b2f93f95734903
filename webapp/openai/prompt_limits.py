"""Fields in terms of tokens: `allowed_token_ids`, `bad_words`, `truncate_prompt_tokens`."""

from __future__ import annotations

from typing import Any, Final

from engines.tokenizer import Tokenizer
from webapp.errors import InvalidRequest
from webapp.openai.fields import Checker, Integer, ListOf, Text, out_of_range, wrong_type
from webapp.openai.surface import Checked

MAX_ALLOWED: Final = 1024
MAX_BAD_WORDS: Final = 128
MAX_BAD_WORD_TOKENS: Final = 1024
_BAD_WORD: Final = Text(1, 1024)


def check_allowed(vocab_size: int) -> Checker:
    """`allowed_token_ids`: at least one id of the vocabulary."""
    ids = ListOf(Integer(0, vocab_size - 1, f"token ids in 0..{vocab_size - 1}"), MAX_ALLOWED)

    def check(value: Any, path: str) -> list[int]:
        checked = ids(value, path)
        if not checked:
            message = f"{path} must hold at least one token id: an empty list allows nothing; leave it out to allow all"
            raise InvalidRequest("invalid_value", message, param=path)
        return checked

    return check


def check_bad_words(value: Any, path: str) -> list[str]:
    """A list of non-empty strings."""
    if not isinstance(value, list):
        raise wrong_type(path, "an array of strings", value)
    if len(value) > MAX_BAD_WORDS:
        raise out_of_range(path, f"an array of at most {MAX_BAD_WORDS} items", f"{len(value)} items")
    return [_BAD_WORD(word, f"{path}[{i}]") for i, word in enumerate(value)]


def bad_word_ids(words: list[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word at the start of a text and, where that is another token, behind a space (as vLLM does).

    Raises:
        InvalidRequest: a word without tokens, with its index; or more tokens than `MAX_BAD_WORD_TOKENS` in all.
    """
    found: list[tuple[int, ...]] = []
    for i, word in enumerate(words):
        plain, spaced = (
            tuple(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " ")
        )
        if not plain or not word.strip():
            message = f"bad_words[{i}] gives no token of its own; leave it out"
            raise InvalidRequest("invalid_value", message, param=f"bad_words[{i}]")
        found.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    num_tokens = sum(map(len, found))
    if num_tokens > MAX_BAD_WORD_TOKENS:
        raise out_of_range("bad_words", f"at most {MAX_BAD_WORD_TOKENS} tokens in all", f"{num_tokens} tokens")
    return tuple(found)


def check_something_is_left(allowed: list[int], forbidden: tuple[tuple[int, ...], ...]) -> None:
    """`bad_words` may not forbid all of `allowed_token_ids`.

    Raises:
        InvalidRequest: `conflict_fields`.
    """
    never = {word[0] for word in forbidden if len(word) == 1}
    if allowed and never.issuperset(allowed):
        message = "bad_words forbids every one of allowed_token_ids; leave at least one"
        raise InvalidRequest("conflict_fields", message, param="allowed_token_ids")


def truncated(ids: list[int], checked: Checked, *, max_tokens: int | None, max_model_len: int) -> list[int]:
    """The part of a prompt that `truncate_prompt_tokens` keeps; -1 keeps what the context holds beside the output.

    Raises:
        InvalidRequest: more than the context was asked for.
    """
    limit = checked.values.get("truncate_prompt_tokens")
    if limit is None:
        return ids
    if limit == 0 or limit > max_model_len:
        raise out_of_range("truncate_prompt_tokens", f"-1, or between 1 and {max_model_len} (the context)", limit)
    if limit == -1:
        limit = max(1, max_model_len - (max_tokens or 1))
    if len(ids) <= limit:
        return ids
    return ids[:limit] if checked.get("truncation_side", "left") == "right" else ids[-limit:]
