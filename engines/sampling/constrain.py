"""Grammar masks over the logits of a step: one batched computation, one batched fill."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.structured.state import GrammarMasks

if TYPE_CHECKING:
    from engines.sampling.row import SamplingRow


class Constrainer:
    """Owned by the engine thread. Masks are made when the first constrained row comes."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids
        self._masks: GrammarMasks | None = None

    def constrain(self, logits: Tensor, rows: list[SamplingRow]) -> dict[int, int]:
        """Set what the grammars do not allow to -inf, in place. Every row has a grammar.

        Returns:
            Tokens of rows that have nothing left to choose: an end token. Where the grammar allowed it (other masks
            took it away), the output ends well; else `grammar.failure` says why it cannot go on.
        """
        states = [row.grammar for row in rows if row.grammar is not None]
        for row, state in zip(rows, states, strict=True):
            state.follow(row.output_ids)
        if self._masks is None:
            self._masks = GrammarMasks(logits.shape[1], torch.get_num_threads())
        allowed = self._masks.allowed(states)
        logits.masked_fill_(torch.from_numpy(allowed) == 0, float("-inf"))
        forced: dict[int, int] = {}
        for i in (logits.amax(-1) == float("-inf")).nonzero().flatten().tolist():
            ends = [token for token in self._eos_token_ids if allowed[i, token]]
            if not ends:
                states[i].fail("the other fields of the request forbid every token that it allows")
            forced[i] = ends[0] if ends else self._eos_token_ids[0]
        return forced
