"""A client's position in a request, and what may follow it. Pure: no Redis, no clock.

A choice's cursor holds every id that a client got and the rolling hash before each. A log or feed entry is taken only
if it begins at or before what is held, has the right prefix hash, and repeats exactly the ids that are held.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from kvstore.state.entries import FinEntry, TokenEntry, TokenLogprobs
from kvstore.state.hashing import roll


class Verdict(StrEnum):
    TAKEN = "taken"  # new tokens
    KNOWN = "known"  # nothing new
    GAP = "gap"  # begins beyond what is held: read the log
    FORK = "fork"  # another text: read the log


@dataclass
class ChoiceCursor:
    """What a client has of one choice. Owned by the thread that serves it."""

    c: int
    ids: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=lambda: [0])  # hashes[i]: over ids[:i]
    fin: FinEntry | None = None
    taken: list[TokenEntry] = field(default_factory=list)

    @property
    def held(self) -> int:
        return len(self.ids)

    @property
    def has_ended(self) -> bool:
        return self.fin is not None

    def take(self, entry: TokenEntry) -> tuple[Verdict, TokenEntry | None]:
        """Takes what `entry` brings beyond what is held; the second value is that part."""
        if entry.index > self.held:
            return Verdict.GAP, None
        if self.hashes[entry.index] != entry.prefix_hash:
            return Verdict.FORK, None
        overlap = min(self.held, entry.end) - entry.index
        if list(entry.token_ids[:overlap]) != self.ids[entry.index : entry.index + overlap]:
            return Verdict.FORK, None
        if entry.end <= self.held:
            return Verdict.KNOWN, None
        new = entry.cut(self.held, self.hashes[-1])
        for token_id in new.token_ids:
            self.hashes.append(roll(self.hashes[-1], token_id))
        self.ids.extend(new.token_ids)
        self.taken.append(new)
        return Verdict.TAKEN, new

    def agrees_with(self, log_ids: Sequence[int]) -> bool:
        """Whether one of the log and what is held is a prefix of the other."""
        shared = min(len(log_ids), self.held)
        return list(log_ids[:shared]) == self.ids[:shared]

    def entry_from(self, start: int) -> TokenEntry:
        """What is held from position `start` on, as one entry to put back into a log that lost it."""
        texts: list[str] = []
        logprobs: list[TokenLogprobs] = []
        for entry in self.taken:
            if entry.end > start:
                part = entry.cut(max(start, entry.index), 0)
                texts += part.texts
                logprobs += part.logprobs or ()
        ids = tuple(self.ids[start:])
        whole = tuple(logprobs) if len(logprobs) == len(ids) else None
        prompt = self.taken[0].prompt_logprobs if start == 0 and self.taken else None
        return TokenEntry(start, self.hashes[start], ids, tuple(texts), whole, prompt)


@dataclass(frozen=True)
class Position:
    """Counts per choice, which choices' ends were told, and one hash over the prefixes: a `Last-Event-ID`."""

    counts: tuple[int, ...]
    ended: tuple[bool, ...]
    digest: str


def digest_of(hashes: Sequence[int]) -> str:
    """One word for the prefix hashes of all choices."""
    return hashlib.sha256(b",".join(b"%d" % h for h in hashes)).hexdigest()[:16]


def sign_position(rid: str, position: Position, secret: bytes) -> str:
    """`12.9e.15-<digest>-<signature>`: `e` marks a choice whose end was told. Opaque to clients."""
    counts = ".".join(f"{n}{'e' if end else ''}" for n, end in zip(position.counts, position.ended, strict=True))
    word = f"{counts}-{position.digest}"
    return f"{word}-{_signature(rid, word, secret)}"


def read_position(rid: str, word: str, secret: bytes) -> Position | None:
    """The position that `sign_position` wrote, or None for another form or a wrong signature."""
    signed, _, signature = word.rpartition("-")
    if not hmac.compare_digest(signature.encode(), _signature(rid, signed, secret).encode()):
        return None
    counts, _, digest = signed.partition("-")
    parts = counts.split(".")
    return Position(
        tuple(int(part.removesuffix("e")) for part in parts), tuple(part.endswith("e") for part in parts), digest
    )


def _signature(rid: str, word: str, secret: bytes) -> str:
    return hmac.new(secret, f"{rid}|{word}".encode(), hashlib.sha256).hexdigest()[:32]
