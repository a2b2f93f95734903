"""Which prompts a prefill worker computes next. Pure: no clock, no tensors, no I/O.

    add -> waiting --admit: cached prefix found, blocks for the whole prompt--> running --chunks--> computed, gone

A batch forms when it is worth a forward pass, or when its oldest has waited long enough. After DistServe and
Sarathi-Serve (OSDI 2024): a prompt longer than the token budget is computed in chunks; the rest goes to others. What a
batch is worth is measured: the share of its time that more of it would not make cheaper (`StepTimeModel.utilization`).
While decode workers are full, batches are smaller (`DecodePressure`).
"""

from __future__ import annotations

from typing import Literal

from engines.scheduler.fair_order import FairOrder
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.scheduler.policy import BlockAllocator, PrefixLookup, is_overdue, length_bucket, padding_tokens
from engines.scheduler.pressure import DecodePressure
from engines.scheduler.sequence_blocks import SequenceBlocks
from engines.scheduler.step_time import StepTimeModel
from engines.sequence import Sequence


class PrefillScheduler:
    """Owned by the engine thread. Prompts of one step are packed, so `bucketed` only decides who shares a step.

    Args:
        max_batch_size: prompts of one step.
        max_num_batched_tokens: tokens of one step; longer prompts go in chunks.
        target_utilization: a batch starts at once when it uses the device so well by the measured step times, or when
            it fills this share of either limit.
        batch_wait_ms: at most this long does a prompt wait for company; not at all while the worker was idle.
        batching: `bucketed` puts only prompts of about the same length into one step.
        step_time: learns from the steps of this engine; None: only the limits count.
        pressure: of the decode workers; None: there is none.
    """

    def __init__(
        self,
        pool: BlockAllocator,
        prefix_cache: PrefixLookup | None,
        block_size: int,
        *,
        max_batch_size: int = 32,
        max_num_batched_tokens: int = 2048,
        target_utilization: float = 0.85,
        batch_wait_ms: float = 50.0,
        batching: Literal["packed", "bucketed"] = "packed",
        step_time: StepTimeModel | None = None,
        pressure: DecodePressure | None = None,
    ) -> None:
        self._blocks = SequenceBlocks(pool, prefix_cache, block_size)
        self._max_batch_size = max_batch_size
        self._max_num_batched_tokens = max_num_batched_tokens
        self._target_utilization = target_utilization
        self._batch_wait_s = batch_wait_ms / 1e3
        self._is_bucketed = batching == "bucketed"
        self._step_time = step_time or StepTimeModel()
        self._pressure = pressure or DecodePressure()
        self._order = FairOrder()
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._step_id = 0
        self._last_step_s = float("-inf")
        self._lacks_blocks = False

    @property
    def step_id(self) -> int:
        return self._step_id

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        """Queue a prompt. It owns no blocks until it is admitted."""
        self._waiting.append(sequence)
        self._lacks_blocks = False

    def remove(self, seq_id: tuple[str, int]) -> None:
        """Forget a sequence, wherever it is; safe to repeat. Its blocks stay its own: the caller frees them."""
        self._waiting = [sequence for sequence in self._waiting if sequence.seq_id != seq_id]
        self._running = [sequence for sequence in self._running if sequence.seq_id != seq_id]
        self._lacks_blocks = False

    def schedule(self, now_s: float) -> StepPlan | None:
        """The next step, or None: nothing to do, not worth starting yet, or no blocks."""
        if not self._running and not self._is_batch_ready(now_s):
            return None
        budget = self._pressure.of(self._max_num_batched_tokens)
        items: list[ScheduledSequence] = []
        for sequence in self._running:
            budget -= self._take_chunk(sequence, budget, items)
        budget = self._admit(now_s, budget, items)
        if not items:
            return None
        self._step_id += 1
        self._last_step_s = now_s
        padding = padding_tokens(item.num_new_tokens for item in items)
        return StepPlan(self._step_id, tuple(items), num_padding_tokens=padding)

    def complete(self, plan: StepPlan, sampled: dict[tuple[str, int], list[int]]) -> None:
        """The step ran: advance its sequences. Those whose prompt is computed leave the scheduler.

        The ids of a sequence with one sample are appended to it; several choices are the caller's to fork.
        """
        for item in plan.scheduled:
            sequence, is_done = item.sequence, item.samples
            sequence.num_computed_tokens = item.start + item.num_new_tokens
            if not is_done:
                continue
            self._blocks.remember(sequence)
            self._running.remove(sequence)
            if sequence.num_samples == 1:
                sequence.output_token_ids.extend(sampled.get(sequence.seq_id, []))
        self._lacks_blocks = False

    def next_wakeup_s(self, now_s: float) -> float | None:
        """When `schedule` may have something without another call here; None: only after one."""
        if self._running:
            return now_s
        if not self._waiting or self._lacks_blocks:
            return None  # freed blocks come with an event, and every event is followed by a step
        return now_s if self._is_batch_ready(now_s) else self._oldest_s() + self._batch_wait_s

    def _is_batch_ready(self, now_s: float) -> bool:
        if not self._waiting:
            return False
        # A step longer than the wait has collected its batch while it ran.
        was_idle = now_s - self._last_step_s >= self._batch_wait_s
        return was_idle or now_s >= self._oldest_s() + self._batch_wait_s or self._is_full_enough()

    def _is_full_enough(self) -> bool:
        num_tokens = sum(sequence.num_uncomputed_tokens for sequence in self._waiting)
        share_of_tokens = num_tokens / self._pressure.of(self._max_num_batched_tokens)
        share_of_places = len(self._waiting) / self._pressure.of(self._max_batch_size)
        measured = self._step_time.utilization(num_tokens) if self._step_time.is_known else 0.0
        return max(share_of_tokens, share_of_places, measured) >= self._target_utilization

    def _oldest_s(self) -> float:
        return min(sequence.arrival_s for sequence in self._waiting)

    def _take_chunk(self, sequence: Sequence, budget: int, items: list[ScheduledSequence]) -> int:
        num_new_tokens = min(budget, sequence.num_uncomputed_tokens)
        if num_new_tokens > 0:
            items.append(ScheduledSequence(sequence, sequence.num_computed_tokens, num_new_tokens))
        return num_new_tokens

    def _admit(self, now_s: float, budget: int, items: list[ScheduledSequence]) -> int:
        """Waiting prompts into the rest of the budget, in order; the first that gets no blocks ends it."""
        max_batch_size = self._pressure.of(self._max_batch_size)
        bucket = length_bucket(items[0].sequence.num_tokens) if items else None
        for sequence in self._order.of(self._waiting, now_s):
            if budget <= 0 or len(items) >= max_batch_size:
                break
            if self._is_bucketed and bucket is not None and length_bucket(sequence.num_tokens) != bucket:
                if is_overdue(sequence, now_s):
                    break  # a batch that its own bucket fills again and again would last for ever
                continue
            if not self._blocks.admit(sequence):
                self._lacks_blocks = True
                break
            self._waiting.remove(sequence)
            self._running.append(sequence)
            self._order.served(sequence, sequence.num_uncomputed_tokens)
            bucket = length_bucket(sequence.num_tokens)
            budget -= self._take_chunk(sequence, budget, items)
        return budget
