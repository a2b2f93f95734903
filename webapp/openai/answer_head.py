"""What the writers of both endpoints share: the head of every object, the counts, the frame of a chat choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.state.entries import FinEntry
from webapp.openai.call import CallNotes, Prompt
from webapp.openai.pieces import Piece, PieceToken
from webapp.openai.prompt_logprobs import known, prompt_logprobs
from webapp.openai.served_model import ServedModel
from webapp.openai.usage import Usage

Json = dict[str, Any]


@dataclass
class AnswerHead:
    """What every object of one call repeats, and what is counted along."""

    id: str
    model: ServedModel
    notes: CallNotes
    usage: Usage
    prompts: list[Prompt]
    first_index: int
    choices_per_prompt: int

    def head(self, kind: str) -> Json:
        return {
            "id": self.id,
            "object": kind,
            "created": self.notes.created,
            "model": self.model.name,
            "system_fingerprint": self.model.fingerprint,
        }

    def chunk(self, kind: str, choices: list[Json]) -> Json:
        out = self.head(kind) | {"choices": choices}
        if self.notes.include_usage:
            out["usage"] = self.usage.body() if self.notes.continuous_usage_stats else None
        return out

    def chat_answer(
        self, choices: Sequence[Sequence[Piece]], to_choice: Callable[[int, Sequence[Piece]], Json]
    ) -> Json:
        """A whole chat answer; `to_choice(index, pieces)` makes one of its choices."""
        for index, pieces in enumerate(choices):
            for piece in pieces:
                self.count(index, piece)
        out = [to_choice(index, pieces) for index, pieces in enumerate(choices)]
        answer = self.head("chat.completion") | {"choices": out, "usage": self.usage.body()}
        scores = self.prompt_scores(0, choices[0][0])
        return answer if scores is None else answer | {"prompt_logprobs": scores}

    def usage_chunk(self, kind: str) -> list[Json]:
        if not self.notes.include_usage:
            return []
        return [self.head(kind) | {"choices": [], "usage": self.usage.body()}]

    def with_ids(self, choice: Json, tokens: Sequence[PieceToken], index: int, *, is_first: bool) -> Json:
        """`token_ids`, and once per choice `prompt_token_ids`, where they were asked for."""
        if self.notes.return_token_ids:
            choice["token_ids"] = [t.token_id for t in tokens]
            if is_first:
                choice["prompt_token_ids"] = self.prompt_of(index).token_ids
        return choice

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[(index - self.first_index) // self.choices_per_prompt]

    def prompt_scores(self, index: int, piece: Piece) -> list[Json | None] | None:
        """`prompt_logprobs` of a whole answer; None where they were not asked for. `piece`: the choice's first."""
        asked = self.notes.prompt_logprobs
        if asked is None:
            return None
        tokenizer = self.model.tokenizer
        num_top = tokenizer.vocab_size if asked == -1 else asked
        return prompt_logprobs(known(piece.prompt_logprobs, self.id), self.prompt_of(index), tokenizer, num_top)

    def count(self, index: int, piece: Piece) -> None:
        self.usage.completion[index] = 0 if self.notes.only_prompt else piece.num_tokens
        if piece.fin is not None:
            prompt = (index - self.first_index) // self.choices_per_prompt
            self.usage.cached[prompt] = max(piece.fin.cached_tokens, self.usage.cached.get(prompt, 0))


def chat_choice(index: int, delta: Json, logprobs: Json | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}


def ending(fin: FinEntry) -> Json:
    return {"finish_reason": fin.reason, "stop_reason": None if fin.stop_reason == "" else fin.stop_reason}
