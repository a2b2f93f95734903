"""The tokenizer of one model: ids, text, and chat prompts."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from engines.tokenizer.chat_template import ChatTemplate
from engines.tokenizer.control_tokens import ControlTokens
from engines.tokenizer.errors import BadTokenizer, ChatTemplateError, UnknownTokenId
from engines.tokenizer.files import TokenizerFiles
from engines.tokenizer.token_bytes import TokenBytes, UnsupportedDecoder


class Tokenizer:
    """Immutable once built, and thread-safe.

    Attributes:
        vocab_size: valid ids are 0..vocab_size-1. A model may have more rows, to pad its embedding; such an id
            can be sampled, but has no text.
        eos_token_ids: tokens that end a reply, from generation_config.json or the next file that names one.
        digest: hex digest over everything here that decides ids and prompts; equal on gateway and workers.
        template_error: why chat is off although the model has a template, else "".
        strip_left: spaces that decoding takes off the beginning of a text.
        max_token_bytes: the most bytes of text that one token can stand for.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        """Raises:
        BadTokenizer: the files contradict each other.
        """
        path = files.folder / "tokenizer.json"
        self._backend = _build(path, files.tokenizer_json)
        content = json.loads(files.tokenizer_json)
        pieces = {token_id: piece for piece, token_id in self._backend.get_vocab(with_added_tokens=True).items()}
        if not pieces:
            raise BadTokenizer(path, "the vocabulary is empty", "Download the file again.")
        self.vocab_size = max(pieces) + 1
        _check_vocabulary(files, self.vocab_size)
        try:
            token_bytes = TokenBytes(content.get("decoder"))
        except UnsupportedDecoder as error:
            raise BadTokenizer(
                path, f"{error} is not supported", "Supported are byte-level BPE and BPE with byte fallback."
            ) from error
        self.strip_left = token_bytes.strip_left
        self.digest = files.digest
        num_ids = max(self.vocab_size, files.num_embeddings or 0)
        self._bytes = [token_bytes.bytes_of(pieces.get(token_id, "")) for token_id in range(num_ids)]
        self.max_token_bytes = max(map(len, self._bytes))
        special = {k: token for k, token in self._backend.get_added_tokens_decoder().items() if token.special}
        self._special_ids = frozenset(special)
        self.eos_token_ids = _eos_ids(files, self._backend, self.vocab_size)
        self._control_tokens = ControlTokens([token.content for token in special.values()])
        self._plain_lock = threading.Lock()
        self._template_variables = files.special_names
        self.template_error = ""
        self._templates = self._compile(files.templates)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a model folder in Hugging Face layout.

        Raises:
            BadTokenizer: a file is missing or cannot be used. A broken chat template does not raise: chat is off then,
                and `template_error` says why.
        """
        return cls(TokenizerFiles.read(Path(path)))

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can be used at all."""
        return bool(self._templates)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens written in it become control tokens: this is a prompt, not a message.

        Args:
            add_special_tokens: put those around it that the model wants (often a beginning-of-text token).
        """
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`; bytes that are not UTF-8 become U+FFFD.

        Raises:
            UnknownTokenId: an id outside of the vocabulary.
        """
        for token_id in token_ids:
            self._check_id(token_id)
        return str(self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself, for logprobs: U+FFFD where its bytes are part of a character."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that one token adds to a text; of a special token, its name.

        Raises:
            UnknownTokenId: outside of the vocabulary and of the padding of the embedding.
        """
        self._check_id(token_id)
        return self._bytes[token_id]

    def text_bytes(self, token_id: int, *, skip_special_tokens: bool) -> bytes:
        """Like `token_bytes`, but empty for a special token that is to be skipped."""
        self._check_id(token_id)
        return b"" if skip_special_tokens and token_id in self._special_ids else self._bytes[token_id]

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def apply_chat_template(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> list[int]:
        """Prompt ids of a conversation of plain JSON values.

        Special tokens inside messages, tools and `kwargs` are encoded as ordinary text, so that a client cannot change
        roles. Tool-call arguments given as JSON text (as OpenAI clients send them) become objects, as templates expect.

        Args:
            kwargs: more variables for the template (`chat_template_kwargs` of a request).

        Raises:
            ChatTemplateError: no usable template, or it does not take this conversation.
        """
        (messages, tools, kwargs), marker = self._control_tokens.mark(
            [[_with_parsed_arguments(message) for message in messages], tools, kwargs]
        )
        text = self._pick_template(tools).render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._template_variables, **kwargs},
        )
        if not marker:
            return self.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for segment, is_plain in self._control_tokens.segments(text, marker):
            backend = self._plain_backend if is_plain else self._backend
            ids += backend.encode(segment, add_special_tokens=False).ids
        return ids

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, blind to special tokens. A second one, because the switch is a state of the object."""
        with self._plain_lock:
            backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
            backend.encode_special_tokens = True
            return backend

    def _compile(self, sources: dict[str, str]) -> dict[str, ChatTemplate]:
        try:
            return {name: ChatTemplate(source) for name, source in sources.items()}
        except ChatTemplateError as error:
            self.template_error = error.text
            return {}

    def _pick_template(self, tools: Sequence[dict[str, Any]] | None) -> ChatTemplate:
        if tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        raise ChatTemplateError(self.template_error or "this model has no chat template: use /v1/completions")

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < len(self._bytes):
            raise UnknownTokenId(token_id, self.vocab_size)


def _build(path: Path, text: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust library raises plain Exception
        raise BadTokenizer(path, f"not a tokenizer ({error})", "Download the file again.") from error
    # A tokenizer saved after training may still cut or pad; a server decides lengths itself.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _check_vocabulary(files: TokenizerFiles, vocab_size: int) -> None:
    if files.num_embeddings is not None and vocab_size > files.num_embeddings:
        raise BadTokenizer(
            files.folder / "tokenizer.json",
            f"it has {vocab_size} ids, but config.json says `vocab_size` {files.num_embeddings}",
            "The tokenizer belongs to another model; take both from the same place.",
        )


def _eos_ids(files: TokenizerFiles, backend: tokenizers.Tokenizer, vocab_size: int) -> tuple[int, ...]:
    limit = max(vocab_size, files.num_embeddings or 0)
    ids: list[int] = []
    for eos in files.eos:
        token_id = backend.token_to_id(eos) if isinstance(eos, str) else eos
        if token_id is None or not 0 <= token_id < limit:
            raise BadTokenizer(
                files.folder / "generation_config.json",
                f"`eos_token_id` names {eos!r}, which is outside of the vocabulary",
                f"Expected ids in 0..{limit - 1}.",
            )
        ids.append(token_id)
    return tuple(ids)


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    return {**message, "tool_calls": [_with_parsed_call(call) for call in calls]}


def _with_parsed_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call  # not JSON: the model's own words, shown to it as they were
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
