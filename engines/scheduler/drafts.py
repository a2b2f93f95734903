"""Guesses in the decode rows of a step: only out of tokens and blocks that nobody else wants.

    plan:   row [last token]  ->  [last token | draft]       blocks for the draft from free ones, above the watermark
    step:   samples after each of them, keeps those that were guessed right, and one more
    settle: KV of the others is overwritten by the next step; blocks that hold nothing go back at once

A sequence is thus left as plain decoding would have left it after as many tokens.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from engines.scheduler.plan import ScheduledSequence
from engines.scheduler.sequence_blocks import SequenceBlocks
from engines.sequence import Sequence


class Proposer(Protocol):
    """Guesses tokens, and is told how it went."""

    def propose(self, sequence: Sequence, *, limit: int) -> list[int]: ...
    def observe(self, sequence: Sequence, *, num_drafted: int, num_kept: int) -> None: ...


class Drafts:
    """Owned by the scheduler.

    Args:
        max_num_seqs: a step with more sequences has no guesses: its arithmetic is no longer free.
        watermark_blocks: blocks that guesses leave free.
    """

    def __init__(self, proposer: Proposer, blocks: SequenceBlocks, *, max_num_seqs: int, watermark_blocks: int) -> None:
        self._proposer = proposer
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._watermark_blocks = watermark_blocks
        self._table_sizes: dict[tuple[str, int], int] = {}  # of the sequences with a draft, before it got blocks

    def add_to(self, items: dict[tuple[str, int], ScheduledSequence], num_tokens_left: int) -> None:
        """Put guesses behind the decode rows of `items`; `num_tokens_left` more tokens fit into the step."""
        self._table_sizes.clear()
        if len(items) > self._max_num_seqs:
            return
        for seq_id, item in items.items():
            sequence = item.sequence
            is_decode = item.num_new_tokens == 1 and item.samples and sequence.output_token_ids
            if not is_decode or sequence.num_samples != 1 or num_tokens_left <= 0:
                continue
            draft = self._proposer.propose(sequence, limit=num_tokens_left)
            if not draft:
                continue
            table_size = len(sequence.block_table)
            draft = draft[: self._blocks.stretch(sequence, len(draft), watermark_blocks=self._watermark_blocks)]
            if draft:
                self._table_sizes[seq_id] = table_size
                items[seq_id] = msgspec.structs.replace(item, num_new_tokens=1 + len(draft), draft=tuple(draft))
                num_tokens_left -= len(draft)

    def settle(self, item: ScheduledSequence, num_sampled: int) -> None:
        """A step with a draft ran and gave `num_sampled` tokens; `num_computed_tokens` says how many have KV."""
        table_size = self._table_sizes.pop(item.sequence.seq_id)
        self._blocks.trim(item.sequence, at_least=table_size)
        self._proposer.observe(item.sequence, num_drafted=len(item.draft), num_kept=num_sampled - 1)
