"""From log entries to what a client is told: pieces of a choice. Streams and whole answers are made of the same ones.

Text that is not yet released (half a character, the beginning of a stop string) comes with a later token, so ids and
logprobs wait until there is text for them. What released no text by the end belongs to the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from kvstore.state.entries import FinEntry, PromptLogprobs, TokenEntry, TokenLogprobs


@dataclass(frozen=True)
class PieceToken:
    """One token of a piece. `text` is what it released; logprobs are None where none were asked for."""

    token_id: int
    text: str
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Piece:
    """Something to tell about choice `c`: text with its tokens, or (with `fin`) its end.

    Attributes:
        num_tokens: output tokens of the choice up to and with this piece.
        prompt_logprobs: only with the first piece, where they were asked for.
    """

    c: int
    text: str
    tokens: tuple[PieceToken, ...]
    num_tokens: int
    fin: FinEntry | None = None
    is_first: bool = False
    prompt_logprobs: PromptLogprobs | None = None


@dataclass
class PieceMaker:
    """Makes the pieces of one choice. Owned by the thread that serves the request."""

    c: int
    num_tokens: int = 0
    is_started: bool = False
    _waiting: list[PieceToken] = field(default_factory=list)
    _prompt_logprobs: PromptLogprobs | None = None

    def tokens(self, entry: TokenEntry) -> list[Piece]:
        """Pieces that `entry`, which follows what came before, releases: one or none."""
        self._prompt_logprobs = self._prompt_logprobs or entry.prompt_logprobs
        logprobs = entry.logprobs or (None,) * len(entry.token_ids)
        new = [PieceToken(*t) for t in zip(entry.token_ids, entry.texts, logprobs, strict=True)]
        self._waiting += new
        text = "".join(entry.texts)
        if not text:
            return []
        # Tokens behind the last one with text wait for theirs.
        last = max(i for i, token in enumerate(self._waiting) if token.text)
        ready, self._waiting = self._waiting[: last + 1], self._waiting[last + 1 :]
        return [self._piece(text, ready)]

    def end(self, fin: FinEntry) -> list[Piece]:
        """The rest of the text, if any, then the end."""
        pieces: list[Piece] = []
        if fin.text:
            waiting, self._waiting = self._waiting, []
            pieces.append(self._piece(fin.text, waiting))
        waiting, self._waiting = self._waiting, []
        self.num_tokens += len(waiting)
        pieces.append(self._started(Piece(self.c, "", tuple(waiting), self.num_tokens, fin)))
        return pieces

    def _piece(self, text: str, tokens: list[PieceToken]) -> Piece:
        self.num_tokens += len(tokens)
        return self._started(Piece(self.c, text, tuple(tokens), self.num_tokens))

    def _started(self, piece: Piece) -> Piece:
        """The first piece says so, and brings what comes once per choice."""
        if self.is_started:
            return piece
        self.is_started = True
        return replace(piece, is_first=True, prompt_logprobs=self._prompt_logprobs)
