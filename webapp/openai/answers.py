"""Answers and chunks of both endpoints, made from the same pieces, so that they say the same.

A `Writer` is one call's. `chunks` turns a piece into stream objects; `answer` turns all pieces into one object. It
does not care who drives it, a thread or an event loop, and holds no socket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from kvstore.state.entries import FinEntry
from webapp.openai.answer_head import AnswerHead, Json, chat_choice, ending
from webapp.openai.call import CallNotes, Prompt
from webapp.openai.logprobs import chat_logprobs, completion_logprobs
from webapp.openai.pieces import Piece
from webapp.openai.prompt_logprobs import echoed_logprobs, known
from webapp.openai.served_model import ServedModel
from webapp.openai.tool_answers import ToolWriter
from webapp.openai.usage import Usage


class Writer(Protocol):
    """Writes one call's answer."""

    usage: Usage

    def chunks(self, index: int, piece: Piece) -> list[Json]: ...
    def last_chunks(self) -> list[Json]: ...
    def answer(self, choices: Sequence[Sequence[Piece]]) -> Json: ...


class ChatWriter:
    """`chat.completion` and its chunks."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self.usage = head.usage

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        self._head.count(index, piece)
        out: list[Json] = []
        if piece.is_first:
            first = chat_choice(index, {"role": "assistant", "content": ""})
            out.append(self._chunk(self._head.with_ids(first, (), index, is_first=True)))
        if piece.text:
            logprobs = chat_logprobs(piece.tokens, self._head.notes.top_logprobs, self._head.model.tokenizer)
            choice = chat_choice(index, {"content": piece.text}, logprobs)
            out.append(self._chunk(self._head.with_ids(choice, piece.tokens, index, is_first=False)))
        if piece.fin is not None:
            choice = chat_choice(index, {}) | ending(piece.fin)
            out.append(self._chunk(self._head.with_ids(choice, piece.tokens, index, is_first=False)))
        return out

    def last_chunks(self) -> list[Json]:
        return self._head.usage_chunk("chat.completion.chunk")

    def answer(self, choices: Sequence[Sequence[Piece]]) -> Json:
        return self._head.chat_answer(choices, self._choice)

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        tokens = [t for p in pieces for t in p.tokens]
        shown = [t for p in pieces if p.text for t in p.tokens]
        fin = pieces[-1].fin
        choice = {
            "index": index,
            "message": {"role": "assistant", "content": "".join(p.text for p in pieces), "refusal": None},
            "logprobs": chat_logprobs(shown, self._head.notes.top_logprobs, self._head.model.tokenizer),
        }
        return self._head.with_ids(choice | (ending(fin) if fin else {}), tokens, index, is_first=True)

    def _chunk(self, choice: Json) -> Json:
        return self._head.chunk("chat.completion.chunk", [choice])


class CompletionWriter:
    """`text_completion`, streamed or not."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self.usage = head.usage
        self._offsets: dict[int, int] = {}

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        self._head.count(index, piece)
        out: list[Json] = []
        is_first = piece.is_first
        echo = self._head.prompt_of(index).echo
        if is_first:
            self._offsets[index] = len(echo)
            if echo:
                choice = _text_choice(index, echo, self._echo_logprobs(index, piece))
                out.append(self._chunk(self._head.with_ids(choice, (), index, is_first=True)))
                is_first = False
        if self._head.notes.only_prompt:
            piece = replace(piece, text="", tokens=())
        if piece.text:
            choice = _text_choice(index, piece.text, self._logprobs(index, piece))
            out.append(self._chunk(self._head.with_ids(choice, piece.tokens, index, is_first=is_first)))
            is_first = False
        if piece.fin is not None:
            choice = _text_choice(index, "", None) | self._ending(piece.fin)
            out.append(self._chunk(self._head.with_ids(choice, piece.tokens, index, is_first=is_first)))
        return out

    def last_chunks(self) -> list[Json]:
        return self._head.usage_chunk("text_completion")

    def answer(self, choices: Sequence[Sequence[Piece]]) -> Json:
        for index, pieces in enumerate(choices):
            for piece in pieces:
                self._head.count(index, piece)
        out = [self._choice(index, pieces) for index, pieces in enumerate(choices)]
        return self._head.head("text_completion") | {"choices": out, "usage": self.usage.body()}

    def _choice(self, index: int, pieces: Sequence[Piece]) -> Json:
        first, fin = pieces[0], pieces[-1].fin
        told = [] if self._head.notes.only_prompt else pieces
        echo = self._head.prompt_of(index).echo
        top = self._head.notes.top_logprobs
        shown = [t for p in told if p.text for t in p.tokens]
        logprobs = completion_logprobs(shown, top, self._head.model.tokenizer, offset=len(echo))
        echoed = self._echo_logprobs(index, first)
        if echoed is not None and logprobs is not None:
            logprobs = {name: echoed[name] + logprobs[name] for name in logprobs}
        choice = _text_choice(index, echo + "".join(p.text for p in told), logprobs)
        scores = self._head.prompt_scores(index, first)
        if scores is not None:
            choice["prompt_logprobs"] = scores
        tokens = [t for p in told for t in p.tokens]
        return self._head.with_ids(choice | (self._ending(fin) if fin else {}), tokens, index, is_first=True)

    def _echo_logprobs(self, index: int, piece: Piece) -> Json | None:
        notes = self._head.notes
        if not notes.echo_logprobs:
            return None
        scores = known(piece.prompt_logprobs, self._head.id)
        return echoed_logprobs(scores, self._head.prompt_of(index), self._head.model.tokenizer, notes.top_logprobs or 0)

    def _ending(self, fin: FinEntry) -> Json:
        return ending(FinEntry(fin.state, "length") if self._head.notes.only_prompt else fin)

    def _logprobs(self, index: int, piece: Piece) -> Json | None:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(piece.text)
        return completion_logprobs(
            piece.tokens, self._head.notes.top_logprobs, self._head.model.tokenizer, offset=offset
        )

    def _chunk(self, choice: Json) -> Json:
        return self._head.chunk("text_completion", [choice])


def make_writer(
    *,
    id: str,
    model: ServedModel,
    notes: CallNotes,
    prompts: list[Prompt],
    choices_per_prompt: int,
    first_index: int = 0,
) -> Writer:
    """The writer of a call, or of one request of it whose first choice has `first_index`."""
    usage = Usage(sum(len(prompt.token_ids) for prompt in prompts))
    head = AnswerHead(id, model, notes, usage, prompts, first_index, choices_per_prompt)
    if notes.api != "chat":
        return CompletionWriter(head)
    return ToolWriter(head) if notes.tools else ChatWriter(head)


def _text_choice(index: int, text: str, logprobs: Json | None) -> Json:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None, "stop_reason": None}
