"""What an engine measures of itself to shape its next steps, in one place: told of every step, asked before each."""

from __future__ import annotations

from dataclasses import dataclass, field

from engines.scheduler.itl_limits import ItlLimits
from engines.scheduler.plan import StepPlan
from engines.scheduler.pressure import DecodePressure
from engines.scheduler.step_time import StepTimeModel


@dataclass
class StepControl:
    """Owned by the engine thread; shared by its scheduler, its hand-offs and its loop.

    Attributes:
        max_num_seqs: sequences that may decode together, whatever is measured.
        limits: None without an SLO.
    """

    max_num_seqs: int = 64
    step_time: StepTimeModel = field(default_factory=StepTimeModel)
    pressure: DecodePressure = field(default_factory=DecodePressure)
    limits: ItlLimits | None = None

    @classmethod
    def of(cls, *, itl_slo_ms: float, max_num_seqs: int, max_num_batched_tokens: int) -> StepControl:
        """`itl_slo_ms` 0: no SLO."""
        control = cls(max_num_seqs)
        if itl_slo_ms:
            control.limits = ItlLimits(
                slo_ms=itl_slo_ms,
                step_time=control.step_time,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
            )
        return control

    @property
    def num_places(self) -> int:
        """Sequences that may decode together at the moment."""
        return self.max_num_seqs if self.limits is None else self.limits.max_num_seqs

    def observe(self, plan: StepPlan, elapsed_s: float) -> None:
        """A step ran for so long."""
        self.step_time.observe(plan.num_tokens, elapsed_s)
        if self.limits is not None:
            self.limits.observe(plan, elapsed_s)
