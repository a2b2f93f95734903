"""Schedulers: who runs in the next step.

Owns the queues, the forming of batches, chunks, admission to blocks and preemption. Pure: time is passed in, nothing is
read, sent or slept on, and there is no torch, so the planner simulates with the very same classes. Must not know
models, transports or requests' texts; blocks are ids that a pool hands out.
"""

from engines.scheduler.decode import DecodeScheduler
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.scheduler.prefill import PrefillScheduler

__all__ = ["DecodeScheduler", "PrefillScheduler", "ScheduledSequence", "StepPlan"]
