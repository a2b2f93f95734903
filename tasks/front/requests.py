"""One request that this worker owns: its ownership, its choices, their text, and how far they are published.

ids        [ t0 t1 t2 t3 | t4 t5 ]        all output ids of a choice, kept until the end
cursor                   ^ n: the log has the ids before it; a reply GAP or DUP moves it, nothing else is needed
hashes     h0 h1 h2 h3 h4 h5 h6           h[i]: prefix hash over ids[:i], so an entry can be cut anywhere
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import msgspec

from engines.messages import TokenOut
from engines.params import SamplingParams
from engines.tokenizer import TextStream, Tokenizer
from kvstore.state.entries import FinEntry, PromptLogprobs, TokenEntry, TokenLogprobs
from kvstore.state.hashing import roll
from kvstore.state.records import AppendItem, RenewItem
from kvstore.state.replies import HandedOff
from kvstore.state.transitions import RequestState
from tasks.front.ports import JobPort

_encode = msgspec.msgpack.Encoder().encode


class Phase(StrEnum):
    """Where a request is on this worker."""

    ALONE = "alone"  # suspect: claimed, waits until it is the only one here
    COMPUTING = "computing"  # its prompt is in the engine
    HANDING = "handing"  # role both: our own `handoff` is on the wire
    TAKEN = "taken"  # the record says that a decode worker has it; the engine's word on the push is awaited
    DECODING = "decoding"
    ENDED = "ended"


TRANSITIONS: Final[dict[Phase, frozenset[Phase]]] = {
    Phase.ALONE: frozenset({Phase.COMPUTING, Phase.ENDED}),
    Phase.COMPUTING: frozenset({Phase.HANDING, Phase.TAKEN, Phase.ENDED}),
    Phase.HANDING: frozenset({Phase.DECODING, Phase.ENDED}),
    Phase.TAKEN: frozenset({Phase.ENDED}),
    Phase.DECODING: frozenset({Phase.TAKEN, Phase.ENDED}),
    Phase.ENDED: frozenset(),
}


class Choice:
    """One sample of a request. Ids come from the engine or, after a recovery, from the log or with the KV."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, index: int) -> None:
        self.index = index
        self.ids: list[int] = []
        self.cursor = 0
        self.fin: FinEntry | None = None
        self.is_fin_published = False
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs | None] | None = [] if params.logprobs is not None else None
        self._prompt_logprobs: PromptLogprobs | None = None
        self._hashes = [0]
        self._stream = TextStream(tokenizer, params)

    @property
    def is_done(self) -> bool:
        return self.fin is not None or self.is_fin_published

    def restore(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None = None) -> None:
        """Ids that an earlier owner chose. If they end in a stop string, the choice is finished."""
        self._take(ids, logprobs)

    def extend(self, out: TokenOut) -> bool:
        """Tokens of the engine. True if a stop string, which only the front can see, ended the choice just now."""
        if self.is_done:
            return False
        num_known = len(self.ids) - out.index
        if num_known < 0:
            raise ValueError(f"{out.rid}: choice {out.c} has {len(self.ids)} tokens, the engine goes on at {out.index}")
        self._prompt_logprobs = self._prompt_logprobs or out.prompt_logprobs
        self._take(out.token_ids[num_known:], None if out.logprobs is None else out.logprobs[num_known:])
        if self.fin is not None:
            self.fin = msgspec.structs.replace(self.fin, cached_tokens=out.cached_tokens)
            return not out.finish
        if out.finish:
            stop_reason = "" if out.stop_reason is None else out.stop_reason
            self._end(out.finish, stop_reason, cached_tokens=out.cached_tokens)
        return False

    def _take(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs] | None) -> None:
        for i, token_id in enumerate(ids):
            self._texts.append(self._stream.push(token_id))
            self.ids.append(token_id)
            self._hashes.append(roll(self._hashes[-1], token_id))
            if self._logprobs is not None:
                self._logprobs.append(None if logprobs is None else logprobs[i])
            if self._stream.matched_stop is not None:
                self._end("stop", self._stream.matched_stop)
                return

    def _end(self, reason: str, stop_reason: str | int, cached_tokens: int = 0) -> None:
        self.fin = FinEntry("FINISHED", reason, stop_reason, self._stream.finish(reason), cached_tokens)

    def is_unpublished(self) -> bool:
        return self.cursor < len(self.ids) or (
            self.fin is not None and not self.is_fin_published and self.cursor == len(self.ids)
        )

    def entry(self) -> TokenEntry | None:
        """The tokens from the cursor on, None if there are none (an end of its own is still to be told)."""
        start, end = self.cursor, len(self.ids)
        if start >= end:
            return None
        # Logprobs of tokens that a former owner computed may be unknown; an entry with such a token goes without.
        known = [] if self._logprobs is None else [one for one in self._logprobs[start:end] if one is not None]
        logprobs = tuple(known) if len(known) == end - start else None
        return TokenEntry(
            start,
            self._hashes[start],
            tuple(self.ids[start:end]),
            tuple(self._texts[start:end]),
            logprobs,
            self._prompt_logprobs if start == 0 else None,
        )

    def hash_at(self, position: int) -> int:
        return self._hashes[position]


@dataclass(eq=False, kw_only=True)
class LiveRequest:
    """Owned by the output thread.

    Attributes:
        mode: push (prefill, to be handed over), local (role both), arrived (handed to us).
        jobs: Celery tasks that show it; none if the message has not come yet.
        deadline_s, started_s, claimed_s: on this process's clock; `claimed_s` of a claim only, when the record says so.
        engine_epoch: epoch that the engine was told; tokens of another one are of a former stay of this request.
        attempts: claims so far, this one included.
        is_moving: it decodes here, and another decode worker has promised blocks for it.
    """

    rid: str
    epoch: int
    token: str
    mode: str
    phase: Phase
    choices: list[Choice]
    wake_n: int
    deadline_s: float
    started_s: float
    engine_epoch: int
    attempts: int = 1
    claimed_s: float = 0.0
    is_moving: bool = False
    jobs: list[JobPort] = field(default_factory=list)

    def advance(self, phase: Phase) -> None:
        assert phase in TRANSITIONS[self.phase], f"{self.rid}: {self.phase} -> {phase}"
        self.phase = phase

    @property
    def state(self) -> RequestState:
        """Its state in the record, as far as we know."""
        return RequestState.DECODING if self.phase is Phase.DECODING else RequestState.PREFILLING

    @property
    def may_publish(self) -> bool:
        """A local one publishes under its decode token only: its own `handoff` would make older appends STALE."""
        return self.phase is Phase.DECODING or (self.phase is Phase.COMPUTING and self.mode == "push")

    @property
    def is_leaving(self) -> bool:
        """The record may say any moment that another decode worker has it."""
        return (self.phase is Phase.COMPUTING and self.mode == "push") or (
            self.phase is Phase.DECODING and self.is_moving
        )

    @property
    def is_finished(self) -> bool:
        """Every choice has its end in the log."""
        return all(choice.is_fin_published for choice in self.choices)

    def append_items(self) -> list[tuple[Choice, AppendItem]]:
        """What the log lacks."""
        return [(choice, self._item(choice)) for choice in self.choices if choice.is_unpublished()]

    def _item(self, choice: Choice) -> AppendItem:
        entry = choice.entry()
        end = choice.cursor if entry is None else entry.end
        return AppendItem(
            rid=self.rid,
            epoch=self.epoch,
            token=self.token,
            state=self.state,
            c=choice.index,
            index=choice.cursor,
            prefix_hash=choice.hash_at(choice.cursor),
            new_hash=choice.hash_at(end),
            count=end - choice.cursor,
            tokens=b"" if entry is None else _encode(entry),
            fin=None if choice.fin is None or choice.is_fin_published else _encode(choice.fin),
        )

    def renew_item(self) -> RenewItem:
        return RenewItem(self.rid, self.epoch, self.token, self.state)


def set_cursors(request: LiveRequest, handed: HandedOff) -> None:
    """Publishing goes on where the log ends; a choice whose end is in the log is over."""
    for choice, n, fin in zip(request.choices, handed.n, handed.fin, strict=True):
        choice.cursor = n
        choice.is_fin_published = choice.is_fin_published or fin


def restore_choices(tokenizer: Tokenizer, params: SamplingParams, ids: Sequence[Sequence[int]]) -> list[Choice]:
    """Choices that came with the KV."""
    choices = [Choice(tokenizer, params, c) for c in range(len(ids))]
    for choice, choice_ids in zip(choices, ids, strict=True):
        choice.restore(choice_ids)
    return choices
