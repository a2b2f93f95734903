"""Chat answers and chunks whose text may hold tool calls.

Tokens wait for the chunk that they, or a later token, give rise to; those behind the last one (a closing tag) go with
the end. Which of them wait depends on the tokens so far alone, so that a resumed stream tells each exactly once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.state.entries import FinEntry
from webapp.openai.answer_head import AnswerHead, Json, chat_choice, ending
from webapp.openai.logprobs import chat_logprobs
from webapp.openai.pieces import Piece, PieceToken
from webapp.openai.tool_calls import CallArguments, CallStarted, Content, Event, ToolCallParser, joined


@dataclass
class _Choice:
    """One choice on its way. `num_known` tokens at its beginning were told by another stream."""

    parser: ToolCallParser
    num_known: int = 0
    is_end_known: bool = False
    num_tokens: int = 0
    waiting: list[tuple[PieceToken, bool]] = field(default_factory=list)  # no event yet; True: has logprobs to tell
    telling: list[tuple[PieceToken, bool]] = field(default_factory=list)  # they go with the next chunk

    def read(self, piece: Piece) -> list[Event]:
        """What `piece` gives rise to, without what another stream told."""
        events: list[Event] = []
        for token in piece.tokens:
            self.num_tokens += 1
            self.waiting.append((token, bool(piece.text)))
            new = self.parser.feed(token.text)
            if self.num_tokens <= self.num_known:
                self.waiting = [] if new else self.waiting
            elif new:
                events += new
                self.tell_all()
        rest = self.parser.feed(piece.text[sum(len(token.text) for token in piece.tokens) :])
        rest += self.parser.end() if piece.fin is not None else []
        if rest:
            events += rest
            self.tell_all()
        return [] if self.is_end_known else events

    def tell_all(self) -> None:
        self.telling += self.waiting
        self.waiting = []


class ToolWriter:
    """`chat.completion` and its chunks, with `tool_calls` where the model made calls."""

    def __init__(self, head: AnswerHead) -> None:
        self._head = head
        self.usage = head.usage
        self._choices: dict[int, _Choice] = {}

    def skip(self, counts: Sequence[int], ended: Sequence[bool]) -> None:
        """A stream that goes on: say nothing about the first `counts[c]` tokens of each choice, nor about known ends.

        Where a call stands in its text can only be known from the text before, so that is read, too.
        """
        for c, (count, is_end_known) in enumerate(zip(counts, ended, strict=True)):
            choice = self._choice(self._head.first_index + c)
            choice.num_known, choice.is_end_known = count, is_end_known

    def chunks(self, index: int, piece: Piece) -> list[Json]:
        self._head.count(index, piece)
        choice, out = self._choice(index), list[Json]()
        if piece.is_first and not choice.num_known:
            first = chat_choice(index, {"role": "assistant", "content": ""})
            out.append(self._chunk(self._head.with_ids(first, (), index, is_first=True)))
        events = choice.read(piece)
        for event in joined(events):
            out.append(self._told(index, choice, chat_choice(index, self._delta(index, event))))
        if piece.fin is not None and not choice.is_end_known:
            choice.tell_all()
            end = chat_choice(index, {}) | self._ending(choice.parser, piece.fin)
            out.append(self._told(index, choice, end, is_end=True))
        return out

    def last_chunks(self) -> list[Json]:
        return self._head.usage_chunk("chat.completion.chunk")

    def answer(self, choices: Sequence[Sequence[Piece]]) -> Json:
        return self._head.chat_answer(choices, self._whole)

    def _whole(self, index: int, pieces: Sequence[Piece]) -> Json:
        parser, fin = self._choice(index).parser, pieces[-1].fin
        content, calls = "", list[Json]()
        for event in [*parser.feed("".join(piece.text for piece in pieces)), *parser.end()]:
            match event:
                case Content(text):
                    content += text
                case CallStarted(k, name):
                    function = {"name": name, "arguments": ""}
                    calls.append({"id": self._call_id(index, k), "type": "function", "function": function})
                case CallArguments(k, text):
                    calls[k]["function"]["arguments"] += text
        message: Json = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
        if calls:
            message["tool_calls"] = calls
        shown = [token for piece in pieces if piece.text for token in piece.tokens]
        choice = {"index": index, "message": message, "logprobs": self._logprobs(shown)}
        tokens = [token for piece in pieces for token in piece.tokens]
        return self._head.with_ids(choice | (self._ending(parser, fin) if fin else {}), tokens, index, is_first=True)

    def _choice(self, index: int) -> _Choice:
        if index not in self._choices:
            self._choices[index] = _Choice(ToolCallParser(only_first=self._head.notes.only_first_call))
        return self._choices[index]

    def _delta(self, index: int, event: Event) -> Json:
        match event:
            case Content(text):
                return {"content": text}
            case CallStarted(k, name):
                call: dict[str, Any] = {"index": k, "id": self._call_id(index, k), "type": "function"}
                return {"tool_calls": [call | {"function": {"name": name, "arguments": ""}}]}
            case CallArguments(k, text):
                return {"tool_calls": [{"index": k, "function": {"arguments": text}}]}

    def _told(self, index: int, choice: _Choice, body: Json, *, is_end: bool = False) -> Json:
        """The chunk, with the tokens that wait for one."""
        told, choice.telling = choice.telling, []
        ids, shown = [token for token, _ in told], [token for token, has_logprobs in told if has_logprobs]
        if shown or not is_end:
            body["logprobs"] = self._logprobs(shown)
        return self._chunk(self._head.with_ids(body, ids, index, is_first=False))

    def _logprobs(self, tokens: Sequence[PieceToken]) -> Json | None:
        return chat_logprobs(tokens, self._head.notes.top_logprobs, self._head.model.tokenizer)

    def _ending(self, parser: ToolCallParser, fin: FinEntry) -> Json:
        """A named function was not the model's own decision: its end is `stop` (as OpenAI and vLLM tell it)."""
        body = ending(fin)
        if fin.reason == "stop" and parser.num_calls and self._head.notes.tools != "named":
            body["finish_reason"] = "tool_calls"
        return body

    def _call_id(self, index: int, k: int) -> str:
        """The same at every gateway, so that a stream can be resumed anywhere."""
        return "call_" + hashlib.sha256(f"{self._head.id}:{index}:{k}".encode()).hexdigest()[:24]

    def _chunk(self, choice: Json) -> Json:
        return self._head.chunk("chat.completion.chunk", [choice])
