"""What a scheduler returns: one step's work. Frozen, pure, no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from engines.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Compute tokens [start, start + num_new_tokens) of `sequence`; sample if that reaches its last token."""

    sequence: Sequence
    start: int
    num_new_tokens: int

    @property
    def samples(self) -> bool:
        return self.start + self.num_new_tokens == self.sequence.num_tokens


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One decision and one forward pass.

    Attributes:
        scheduled: prefill chunks and decode tokens mixed, in the order of the batch.
        preempted: sequences whose blocks were taken; they are in no queue of the scheduler any more.
        num_padding_tokens: what padding to the longest of its bucket would have added (packed batches add none).
    """

    step_id: int
    scheduled: tuple[ScheduledSequence, ...]
    preempted: tuple[Sequence, ...] = ()
    num_padding_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)
