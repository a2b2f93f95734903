"""Text of one output stream, token by token.

    ids     5     9     17    3     2(end)
    bytes   "Hi"  F0 9F 99 82 "EN"  "D!"           stop = "END"
    text    "Hi"  ""    "🙂"  ""    ""  -> matched_stop after "D!", finish() gives ""

The text released by each token is a pure function of the ids up to it (and of the parameters): a recovered worker that
pushes the same ids gets the same texts, so log entries may be cut anywhere.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from engines.tokenizer.stop_strings import StopMatcher

if TYPE_CHECKING:
    from engines.params import SamplingParams
    from engines.tokenizer.tokenizer import Tokenizer

_Utf8Decoder = codecs.getincrementaldecoder("utf-8")


class TextStream:
    """Incremental detokenising of one choice. Owned by one thread.

    Attributes:
        matched_stop: the stop string that ended the text, once there is one. Tokens pushed later have no text.
        num_tokens: tokens pushed so far.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self.matched_stop: str | None = None
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._params = params
        # The end token is not text: the reply ends before it (unless the client asked to see what stopped it).
        eos = () if params.ignore_eos else tokenizer.eos_token_ids
        self._silent_ids = (
            frozenset() if params.include_stop_str_in_output else frozenset((*eos, *params.stop_token_ids))
        )
        self._utf8 = _Utf8Decoder(errors="replace")
        self._num_to_strip = tokenizer.strip_left
        self._matcher = StopMatcher(params.stop) if params.stop else None
        self._held = ""

    def push(self, token_id: int, *, stops_count: bool | None = None) -> str:
        """Text released by this token: whole characters only, and nothing that may turn out to be a stop string.

        Args:
            stops_count: whether a stop string may match here; by default, from token number `min_tokens + 1` on.
                Text of tokens for which it is False is never part of a match.

        Raises:
            UnknownTokenId: not an id of this tokenizer.
        """
        self.num_tokens += 1
        if self.matched_stop is not None:
            return ""
        if stops_count is None:
            stops_count = self.num_tokens > self._params.min_tokens
        if stops_count and token_id in self._silent_ids:
            return ""
        piece = self._tokenizer.text_bytes(token_id, skip_special_tokens=self._params.skip_special_tokens)
        return self._release(self._strip(self._utf8.decode(piece)), stops_count)

    def finish(self, reason: str) -> str:  # noqa: ARG002 - every end releases the same rest, but callers say which end
        """What is still held when the choice ends: the beginning of a stop string that never came to its end, and
        U+FFFD for a character whose last bytes were not generated. Empty after a matched stop string."""
        if self.matched_stop is not None:
            return ""
        rest = self._held + self._strip(self._utf8.decode(b"", final=True))
        self._held = ""
        return rest

    def _release(self, text: str, stops_count: bool) -> str:
        if self._matcher is None or not text:
            return text
        if not stops_count:
            self._matcher.forget()
            return text
        match = self._matcher.feed(text)
        if match is not None:
            return self._end_at(match.stop, text[: match.end])
        if self._params.include_stop_str_in_output:
            return text
        known = self._held + text
        num_released = len(known) - self._matcher.num_held
        self._held = known[num_released:]
        return known[:num_released]

    def _end_at(self, stop: str, text: str) -> str:
        self.matched_stop = stop
        if self._params.include_stop_str_in_output:
            return text
        known, self._held = self._held + text, ""
        return known[: len(known) - len(stop)]

    def _strip(self, text: str) -> str:
        while self._num_to_strip and text:
            if not text.startswith(" "):
                self._num_to_strip = 0
                break
            text = text[1:]
            self._num_to_strip -= 1
        return text
