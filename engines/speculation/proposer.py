"""Guesses for one sequence: what its n-grams suggest, as long as its guesses are kept often enough.

A step computes the sequence's last token and the guesses behind it, and samples after each with the very random number,
penalties and grammar state that plain decoding would have there. Guess i is kept as long as it is the token sampled at
its place. So the output is plain decoding's, token for token, greedy and seeded: stronger than the rejection sampling
of Leviathan et al. (ICML 2023), which keeps the distribution only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engines.speculation.acceptance import Acceptance
from engines.speculation.ngram_index import NgramIndex

if TYPE_CHECKING:
    from engines.sequence import Sequence


class DraftHistory:
    """What the proposer keeps of one sequence. Lost with it: whoever recovers the sequence begins anew."""

    def __init__(self, index: NgramIndex) -> None:
        self.index = index
        self.acceptance = Acceptance()


class NgramProposer:
    """Owned by the engine thread.

    Args:
        max_draft_tokens: guesses of a sequence in one step, at most.
        min_ngram, max_ngram: see `NgramIndex`.
        end_token_ids: never guessed, nor are the stop ids of a request: so only the last token of a step can be an end.
        max_model_len: longest sequence, in tokens.
    """

    def __init__(
        self,
        *,
        max_draft_tokens: int,
        min_ngram: int,
        max_ngram: int,
        end_token_ids: frozenset[int],
        max_model_len: int,
    ) -> None:
        self._max_draft_tokens = max_draft_tokens
        self._min_ngram = min_ngram
        self._max_ngram = max_ngram
        self._end_token_ids = end_token_ids
        self._max_model_len = max_model_len

    def propose(self, sequence: Sequence, *, limit: int) -> list[int]:
        """At most `limit` guesses of what follows the last token; none that could be past an end of the output."""
        output_ids = sequence.output_token_ids
        # One less than the room: the token that is sampled after the last guess needs a place, too.
        room = min(sequence.params.max_tokens - len(output_ids), self._max_model_len - sequence.num_tokens) - 1
        limit = min(limit, room, self._max_draft_tokens)
        if limit <= 0:
            return []
        if sequence.draft_history is None:
            sequence.draft_history = DraftHistory(NgramIndex(min_size=self._min_ngram, max_size=self._max_ngram))
        history = sequence.draft_history
        history.index.follow(sequence.prompt_token_ids, output_ids)
        draft = self._before_end(history.index.propose(limit), sequence.params.stop_token_ids)
        draft = draft[: history.acceptance.draft_length(len(draft))]
        if draft and sequence.grammar is not None:
            draft = draft[: sequence.grammar.num_allowed(output_ids, draft)]
        return draft

    def observe(self, sequence: Sequence, *, num_drafted: int, num_kept: int) -> None:
        """`num_kept` of the `num_drafted` guesses of a step were right."""
        assert sequence.draft_history is not None
        sequence.draft_history.acceptance.observe(num_drafted=num_drafted, num_kept=num_kept)

    def _before_end(self, draft: list[int], stop_token_ids: tuple[int, ...]) -> list[int]:
        for i, token_id in enumerate(draft):
            if token_id in self._end_token_ids or token_id in stop_token_ids:
                return draft[:i]
        return draft
