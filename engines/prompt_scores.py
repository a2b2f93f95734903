"""Logprobs of a prompt, gathered chunk by chunk while it is computed. No torch: sequences carry it."""

from __future__ import annotations

from kvstore.state.entries import PromptLogprobs


class PromptScores:
    """Owned by the engine thread. Packed as in `PromptLogprobs`, so that a long prompt costs bytes, not objects."""

    def __init__(self, num_top: int) -> None:
        self.num_top = num_top
        self._logprobs = bytearray()
        self._ranks = bytearray()
        self._top_ids = bytearray()
        self._top_logprobs = bytearray()

    def add(self, *, logprobs: bytes, ranks: bytes, top_ids: bytes, top_logprobs: bytes) -> None:
        """The next tokens."""
        self._logprobs += logprobs
        self._ranks += ranks
        self._top_ids += top_ids
        self._top_logprobs += top_logprobs

    def whole(self) -> PromptLogprobs:
        """What was gathered so far."""
        return PromptLogprobs(
            self.num_top, bytes(self._logprobs), bytes(self._ranks), bytes(self._top_ids), bytes(self._top_logprobs)
        )
