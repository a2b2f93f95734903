"""What the front is told of the tokens of a step. Pure functions over sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engines.finish import Finish, FinishRule
from engines.handoff_reader import Arrival
from engines.messages import TokenOut
from engines.sequence import Sequence
from engines.transfer_state import TransferState
from kvstore.state.entries import TokenLogprobs

if TYPE_CHECKING:
    from engines.step_rows import SampledTokens


def token_out(
    sequence: Sequence,
    choice: int,
    index: int,
    ids: list[int],
    logprobs: list[TokenLogprobs] | None,
    finish: Finish | None,
) -> TokenOut:
    """`ids` of a choice from output token `index` on."""
    return TokenOut(
        sequence.rid,
        choice,
        index,
        ids,
        logprobs,
        finish.reason if finish else "",
        finish.stop_reason if finish else None,
        sequence.num_cached_tokens,
        sequence.epoch,
        sequence.prompt_scores.whole() if sequence.prompt_scores is not None and index == 0 else None,
    )


def first_tokens(item: SampledTokens, rule: FinishRule, outs: list[TokenOut]) -> tuple[list[list[int]], bool]:
    """Ids of each choice after the first sampling, and whether all are finished already. Appends to `outs`."""
    sequence = item.sequence
    base = sequence.output_token_ids[:]
    if sequence.num_samples == 1:
        base = base[: len(base) - len(item.token_ids)]
    choices, finished = [], []
    for j, token_id in enumerate(item.token_ids):
        ids = [*base, token_id] if sequence.num_samples == 1 else [token_id]
        finish = rule.check(sequence.params, len(sequence.prompt_token_ids), ids)
        logprobs = None if item.logprobs is None else [item.logprobs[j]]
        outs.append(token_out(sequence, sequence.choice + j, len(ids) - 1, [token_id], logprobs, finish))
        choices.append(ids)
        finished.append(finish is not None)
    return choices, bool(finished) and all(finished)


def arrival_here(sequence: Sequence, blocks: list[int], choices: list[list[int]]) -> Arrival:
    """A prompt computed where it is decoded, as if it had been handed over; `blocks` become the arrival's."""
    state = TransferState(
        sequence.prompt_token_ids,
        choices,
        sequence.params,
        sequence.seed,
        0.0,
        sequence.num_cached_tokens,
        sequence.tenant,
        sequence.priority,
        sequence.num_preemptions,
    )
    return Arrival(sequence.rid, blocks, len(sequence.prompt_token_ids), state, sequence.deadline_s)
