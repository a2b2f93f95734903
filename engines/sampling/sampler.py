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

from engines.sampling.adjust import adjust_logits
from engines.sampling.choose import Filters, choose
from engines.sampling.constrain import Constrainer
from engines.sampling.peaks import largest
from engines.sampling.randomness import uniforms
from engines.sampling.row import SamplingRow
from kvstore.state.entries import TokenLogprobs


class Sampler:
    """Knows the end tokens of the model; keeps nothing from step to step."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids
        self._constrainer = Constrainer(eos_token_ids)

    def sample(
        self, logits: Tensor, rows: list[SamplingRow], peaks: list[int] | None = None
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """One token id per row, and its logprobs where the row asks for them.

        Args:
            logits: `[num_rows, vocab]` fp32 without NaN; not changed.
            peaks: `find_peaks` of them, where the caller has looked already.
        """
        changed = [i for i, row in enumerate(rows) if row.needs_adjustment]
        adjusted = logits
        if changed:
            part = logits[changed]
            adjust_logits(part, [rows[i] for i in changed], self._eos_token_ids)
            adjusted = logits.clone()
            adjusted[changed] = part
        constrained = {i: row for i, row in enumerate(rows) if row.grammar is not None}
        if constrained:
            adjusted = self._constrainer.copy(logits) if adjusted is logits else adjusted
            forbidden = self._constrainer.mask(adjusted, constrained)
        token_ids = largest(adjusted) if peaks is None or adjusted is not logits else list(peaks)
        forced = self._constrainer.ends(adjusted, constrained, forbidden, token_ids) if constrained else {}
        drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy and i not in forced]
        if drawn:
            chosen = choose(adjusted[drawn], _filters([rows[i] for i in drawn])).tolist()
            # Rounding at the very end of the cumulative sum may fall on what a mask forbids.
            is_masked = constrained and (adjusted[drawn, chosen] == float("-inf")).tolist()
            for k, (i, token_id) in enumerate(zip(drawn, chosen, strict=True)):
                if rows[i].grammar is None or not is_masked[k]:
                    token_ids[i] = token_id
        for i, token_id in forced.items():
            token_ids[i] = token_id
        return token_ids, _logprobs(logits, rows, token_ids)


def _filters(rows: list[SamplingRow]) -> Filters:
    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Filters(
        temperature=column([row.params.temperature for row in rows]),
        top_k=torch.tensor([row.params.top_k for row in rows]),
        top_p=column([row.params.top_p for row in rows]),
        min_p=column([row.params.min_p for row in rows]),
        uniform=torch.from_numpy(uniforms([(row.seed, row.choice, row.index) for row in rows])),
    )


def _logprobs(logits: Tensor, rows: list[SamplingRow], token_ids: list[int]) -> list[TokenLogprobs | None]:
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    found: list[TokenLogprobs | None] = [None] * len(rows)
    if not wanted:
        return found
    logprobs = logits[wanted].log_softmax(-1)
    num_top = min(max(rows[i].params.logprobs or 0 for i in wanted), logits.shape[1])
    # Sorted by (value, id): topk alone leaves the order of equal values open.
    best = logprobs.topk(num_top, dim=-1).indices.sort(dim=-1).values
    values, order = logprobs.gather(1, best).sort(dim=-1, descending=True, stable=True)
    best_ids, best_values = best.gather(1, order).tolist(), values.tolist()
    own_values = logprobs[range(len(wanted)), [token_ids[i] for i in wanted]].tolist()
    for k, i in enumerate(wanted):
        count = min(rows[i].params.logprobs or 0, num_top)
        top = tuple(zip(best_ids[k][:count], best_values[k][:count], strict=True))
        found[i] = TokenLogprobs(own_values[k], top)
    return found
