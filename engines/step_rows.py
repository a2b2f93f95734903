"""From the plan of a step to the logits it needs and the rows that choose from them, and from choices to its result.

one sample      last token               1 logit row    1 sampling row
n samples       last token               1 logit row    n sampling rows
with a draft    last token, each guess   1 + k          1 + k, kept up to the first wrong guess
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import msgspec

from engines.sampling.row import SamplingRow
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.sequence import Sequence
from engines.speculation.verify import num_kept_tokens
from kvstore.state.entries import TokenLogprobs


class SampledTokens(msgspec.Struct, frozen=True):
    """New tokens of a sequence that reached its end.

    With one sample they follow each other, one or, behind right guesses, several. With more there are `num_samples` of
    them, choice `sequence.choice + j` each. `logprobs` goes with `token_ids`, or is None where the request wants none.
    """

    sequence: Sequence
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None


@dataclass(slots=True)
class StepRows:
    """What is to be sampled in a step.

    Attributes:
        items: those of the plan that reach their last token, in its order.
        hidden_rows: rows of the step's hidden states whose logits are needed.
        logit_of: for each of `rows`, its place in `hidden_rows`.
        rids: the request of each of `hidden_rows`.
        drafted: places in `hidden_rows` that lie behind a guess: what they give may turn out not to count.
    """

    items: list[ScheduledSequence] = field(default_factory=list)
    hidden_rows: list[int] = field(default_factory=list)
    rids: list[str] = field(default_factory=list)
    logit_of: list[int] = field(default_factory=list)
    rows: list[SamplingRow] = field(default_factory=list)
    drafted: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, plan: StepPlan) -> StepRows:
        needs, end = cls(), 0
        for item in plan.scheduled:
            end += item.num_new_tokens
            if not item.samples:
                continue
            sequence = item.sequence
            if item.draft or sequence.num_samples != 1:
                needs._add(item, end)
                continue
            needs.items.append(item)
            needs.logit_of.append(len(needs.hidden_rows))
            needs.hidden_rows.append(end - 1)
            needs.rids.append(sequence.rid)
            needs.rows.append(_row(sequence))
        return needs

    def result(
        self, token_ids: list[int], logprobs: list[TokenLogprobs | None], broken: Collection[int] = ()
    ) -> list[SampledTokens]:
        """What each item got; `broken` logit rows had nothing to choose from."""
        sampled, at = [], 0
        wants_logprobs = any(entry is not None for entry in logprobs)
        for item in self.items:
            lo, at = at, at + _num_rows(item)
            hi = at
            if item.draft:
                is_usable = [self._is_usable(i, broken) for i in range(lo, at)]
                hi = lo + num_kept_tokens(item.draft, token_ids[lo:at], is_usable)
            found = [entry for entry in logprobs[lo:hi] if entry is not None] if wants_logprobs else []
            sampled.append(SampledTokens(item.sequence, token_ids[lo:hi], found or None))
        return sampled

    def _add(self, item: ScheduledSequence, end: int) -> None:
        sequence, draft = item.sequence, item.draft
        self.items.append(item)
        if sequence.num_samples == 0:
            return
        first = len(self.hidden_rows)
        self.hidden_rows += range(end - 1 - len(draft), end)
        self.rids += [sequence.rid] * (1 + len(draft))
        if not draft:
            self.logit_of += [first] * sequence.num_samples
            self.rows.append(_row(sequence))
            self.rows += [_make_row(sequence, sequence.choice + j) for j in range(1, sequence.num_samples)]
            return
        self.logit_of += range(first, first + 1 + len(draft))
        self.rows.append(_row(sequence))
        self.drafted.update(range(first + 1, first + 1 + len(draft)))
        for i in range(1, 1 + len(draft)):
            self.rows.append(_row_behind(sequence, draft[:i]))

    def _is_usable(self, row_idx: int, broken: Collection[int]) -> bool:
        grammar = self.rows[row_idx].grammar
        return self.logit_of[row_idx] not in broken and (grammar is None or not grammar.failure)


def _num_rows(item: ScheduledSequence) -> int:
    return 1 + len(item.draft) if item.draft else item.sequence.num_samples


def _row(sequence: Sequence) -> SamplingRow:
    """The same from step to step: it holds the sequence's own lists."""
    row = sequence.sampling_row
    if row is None or row.output_ids is not sequence.output_token_ids or row.grammar is not sequence.grammar:
        row = sequence.sampling_row = _make_row(sequence, sequence.choice)
    return row


def _make_row(sequence: Sequence, choice: int) -> SamplingRow:
    return SamplingRow(
        sequence.params, sequence.seed, choice, sequence.prompt_token_ids, sequence.output_token_ids, sequence.grammar
    )


def _row_behind(sequence: Sequence, guesses: tuple[int, ...]) -> SamplingRow:
    """As if `guesses` were part of the output. Its grammar is a copy: the sequence's own stays where the output is."""
    grammar = None if sequence.grammar is None else sequence.grammar.fork()
    output_ids = [*sequence.output_token_ids, *guesses]
    return SamplingRow(sequence.params, sequence.seed, sequence.choice, sequence.prompt_token_ids, output_ids, grammar)
