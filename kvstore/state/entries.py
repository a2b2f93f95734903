"""What the log of a choice and the feed of a gateway hold: the formats two processes share.

    log   cel:{sNN}:log:<rid>:<c>   entry id "<n after the entry>-0", field "t": msgpack TokenEntry
                                    entry id "<n>-1",                 field "f": msgpack FinEntry
    feed  cel:{sNN}:feed:<gateway>  field "d": msgpack list of FeedItem, one packed list per append_batch call

Per-token text is a pure function of the ids of its choice, so a re-cut entry has the same text. Text that a
function of the ids cannot release yet (half a UTF-8 character, the beginning of a stop string) comes with a later
token, or in `FinEntry.text`.
"""

from __future__ import annotations

import msgspec


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural logs of the model's own distribution, before temperature, penalties and bias."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


class PromptLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Logprobs of a prompt's tokens from the second on (the first follows nothing), as packed native arrays.

    Attributes:
        logprobs: float32 per token.     ranks: int32 per token, 1 is the likeliest.
        top_ids, top_logprobs: int32 and float32, `num_top` per token, best first.
    """

    num_top: int
    logprobs: bytes
    ranks: bytes
    top_ids: bytes = b""
    top_logprobs: bytes = b""


class TokenEntry(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one choice, from position `index` on.

    `prompt_logprobs` only comes with position 0, to whoever asked for them: what has the first token has them too.
    """

    index: int
    prefix_hash: int  # over the ids before `index`
    token_ids: tuple[int, ...]
    texts: tuple[str, ...]  # one per token, "" where nothing is released yet
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def end(self) -> int:
        return self.index + len(self.token_ids)

    def cut(self, start: int, prefix_hash: int) -> TokenEntry:
        """The part from position `start` on, which follows a prefix with hash `prefix_hash`."""
        k = start - self.index
        return TokenEntry(
            start,
            prefix_hash,
            self.token_ids[k:],
            self.texts[k:],
            None if self.logprobs is None else self.logprobs[k:],
            None if k else self.prompt_logprobs,
        )


class FinEntry(msgspec.Struct, frozen=True, array_like=True):
    """The end of one choice. The functions themselves write it for CANCELLED, EXPIRED and a reaped FAILED."""

    state: str  # FINISHED | FAILED | CANCELLED | EXPIRED
    reason: str  # "stop" | "length", or the error code of a request that did not finish
    stop_reason: str | int = ""  # matched stop string or id; "" is none (a Lua table cannot end in nil)
    text: str = ""  # text released by the end itself
    cached_tokens: int = 0  # prompt tokens found in a prefix cache


class FeedItem(msgspec.Struct, frozen=True, array_like=True):
    """A hint for a gateway: choice `c` of `rid` has `n` tokens now. `tokens` and `fin` are the packed log entries."""

    rid: str
    c: int
    n: int
    prefix_hash: int  # before tokens.index
    tokens: bytes = b""
    fin: bytes = b""
