"""Choose the next tokens of a step, all rows at once.

Order of operations, per row:
    1. logprobs of the model's own distribution: before everything else
    2. logit_bias      3. repetition, then frequency and presence penalty
    4. masks: all but allowed_token_ids, bad words, end tokens before min_tokens
    5. the mask of the row's grammar, last: where nothing is left that it allows, an end token or an end by name
    6. temperature 0: the largest logit, lowest id on ties. Else temperature, top_k, top_p, min_p, random choice
A step whose rows are all greedy and unchanged is one argmax.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.ext.library import Kernels
from engines.sampling.adjust import adjust_logits
from engines.sampling.chooser import find_chooser
from engines.sampling.columns import FilterColumns
from engines.sampling.constrain import Constrainer
from engines.sampling.peaks import GroupMaxima, largest
from engines.sampling.row import SamplingRow
from kvstore.state.entries import TokenLogprobs


class Sampler:
    """Knows the end tokens of the model. What it keeps from step to step only saves time."""

    def __init__(self, eos_token_ids: tuple[int, ...], kernels: Kernels | None = None) -> None:
        self._eos_token_ids = eos_token_ids
        self._constrainer = Constrainer(eos_token_ids)
        self._chooser = find_chooser(kernels)
        self._columns = FilterColumns()
        self._copy = torch.empty(0, 0)

    def wants_maxima(self, rows: list[SamplingRow]) -> bool:
        """Whether `sample` saves time by them: a choice is random, and no row is changed before."""
        if all(row.is_plain for row in rows):
            return False
        is_changed = any(row.grammar is not None or row.needs_adjustment for row in rows)
        return not is_changed and not all(row.params.is_greedy for row in rows)

    def sample(
        self,
        logits: Tensor,
        rows: list[SamplingRow],
        peaks: list[int] | None = None,
        maxima: GroupMaxima | None = None,
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """One token id per row, and its logprobs where the row asks for them.

        Args:
            logits: `[num_rows, vocab]` fp32 without NaN; not changed.
            peaks: `find_peaks` of them, where the caller has looked already.
            maxima: of them, where the head has kept them.
        """
        if peaks is not None and all(row.is_plain for row in rows):
            return peaks, [None] * len(rows)
        adjusted, constrained = logits, {i: row for i, row in enumerate(rows) if row.grammar is not None}
        changed = {i: row for i, row in enumerate(rows) if row.needs_adjustment}
        if changed or constrained:
            adjusted = self._copied(logits)
        if changed:
            adjust_logits(adjusted, changed, self._eos_token_ids)
        if constrained:
            forbidden = self._constrainer.mask(adjusted, constrained)
        token_ids = largest(adjusted) if peaks is None or adjusted is not logits else list(peaks)
        forced = self._constrainer.ends(adjusted, constrained, forbidden, token_ids) if constrained else {}
        drawn = {i: row for i, row in enumerate(rows) if not row.params.is_greedy and i not in forced}
        if drawn:
            row_idx = list(drawn)
            columns = self._columns.of(list(drawn.values()))
            chosen = self._chooser.choose(adjusted, row_idx, columns, maxima if adjusted is logits else None)
            for i, token_id in zip(row_idx, chosen, strict=True):
                token_ids[i] = token_id
        for i, token_id in forced.items():
            token_ids[i] = token_id
        return token_ids, self._logprobs(logits, rows, token_ids)

    def _copied(self, logits: Tensor) -> Tensor:
        """A copy, valid until the next one.

        The memory is kept: for a large vocabulary, new pages from the kernel at every step cost more than the changes.
        """
        copy = self._copy
        if len(copy) < len(logits) or copy.shape[1] != logits.shape[1] or copy.device != logits.device:
            self._copy = torch.empty_like(logits)
        return self._copy[: len(logits)].copy_(logits)

    def _logprobs(self, logits: Tensor, rows: list[SamplingRow], token_ids: list[int]) -> list[TokenLogprobs | None]:
        found: list[TokenLogprobs | None] = [None] * len(rows)
        wanted = {i: row.params.logprobs for i, row in enumerate(rows) if row.params.logprobs is not None}
        if wanted:
            row_idx = list(wanted)
            scored = self._chooser.score(logits, row_idx, [token_ids[i] for i in row_idx], max(wanted.values()))
            for i, ids, logprobs in zip(row_idx, *scored, strict=True):
                top = zip(ids[: wanted[i]], logprobs, strict=False)
                found[i] = TokenLogprobs(logprobs[-1], tuple(top))
        return found
