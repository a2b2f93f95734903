"""What a scheduler returns: one step's work. Frozen, pure, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from engines.sequence import Sequence
from engines.swap.swapped import BlockCopy


class ScheduledSequence(msgspec.Struct, frozen=True):
    """Compute tokens [start, start + num_new_tokens) of `sequence`; sample if that reaches its last token.

    Attributes:
        draft: guesses of what follows the last token, the end of those tokens; one is sampled behind each.
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    draft: tuple[int, ...] = ()

    @property
    def num_known_tokens(self) -> int:
        """New tokens that are no guesses."""
        return self.num_new_tokens - len(self.draft)

    @property
    def samples(self) -> bool:
        return self.start + self.num_known_tokens == self.sequence.num_tokens

    def token_ids(self) -> list[int]:
        """The ids to compute, `num_new_tokens` of them."""
        known = self.sequence.token_slice(self.start, self.start + self.num_known_tokens)
        return [*known, *self.draft] if self.draft else known


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One decision and one forward pass.

    Attributes:
        scheduled: prefill chunks and decode tokens mixed, in the order of the batch.
        swapped_out, swapped_in: KV to copy to and from host memory before the forward pass, in this order.
        moved: sequences that go to another decode worker, with their blocks; they are in no queue any more.
        preempted: sequences whose blocks were taken; they are in no queue of the scheduler any more.
        num_padding_tokens: what padding to the longest of its bucket would have added (packed batches add none).
    """

    step_id: int
    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    num_padding_tokens: int = 0
    swapped_out: tuple[BlockCopy, ...] = ()
    swapped_in: tuple[BlockCopy, ...] = ()
    moved: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum([item.num_new_tokens for item in self.scheduled])

    @property
    def max_outputs(self) -> int:
        """Tokens that one sequence may get by this step, at most."""
        return 1 + max([len(item.draft) for item in self.scheduled], default=0)
