"""The effects of preemption: copies to and from host memory, and what was done, counted. Decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from engines.scheduler.plan import StepPlan
from engines.swap.ladder import Ladder
from engines.swap.swapped import BlockCopy

if TYPE_CHECKING:
    from engines.swap.host_store import HostStore


class Relief:
    """Owned by the engine thread. `store` is None where nothing is swapped."""

    def __init__(self, ladder: Ladder, store: HostStore | None = None) -> None:
        self.ladder = ladder
        self._store = store
        self._counts: Counter[str] = Counter()
        self._copy_s = 0.0

    def copy(self, plan: StepPlan) -> list[str]:
        """Make the copies of a plan, before its forward pass writes into a block. Blocks until they are made.

        Returns: requests whose KV was damaged in host memory. Nothing of them may be computed.
        """
        self._count("swapped_out", self._save(plan.swapped_out))
        damaged = self._load(plan.swapped_in)
        self._count("swapped_in", [copy for copy in plan.swapped_in if copy.rid not in damaged])
        self._counts["swap_damaged"] += len(damaged)
        return damaged

    def counted(self, what: str, number: int = 1) -> None:
        """`what`: moved, released."""
        self._counts[what] += number

    def counters(self) -> dict[str, float]:
        """Totals, for `Stats.counters`: requests, but for the blocks copied, either way, and the seconds that took."""
        names = ("swapped_out", "swapped_in", "swap_damaged", "moved", "released")
        totals = {f"preempt_{name}": float(self._counts[name]) for name in names}
        totals["preempt_swap_blocks"] = float(self._counts["swap_blocks"])
        totals["preempt_swap_s"] = self._copy_s
        return totals

    def _save(self, copies: Iterable[BlockCopy]) -> list[BlockCopy]:
        done = []
        for copy in copies:
            assert self._store is not None
            started_s = time.perf_counter()
            self._store.save(copy.pairs)
            self._copied(copy, time.perf_counter() - started_s)
            done.append(copy)
        return done

    def _load(self, copies: Iterable[BlockCopy]) -> list[str]:
        damaged = []
        for copy in copies:
            assert self._store is not None
            started_s = time.perf_counter()
            if self._store.load(copy.pairs):
                self._copied(copy, time.perf_counter() - started_s)
            else:
                damaged.append(copy.rid)
        return damaged

    def _copied(self, copy: BlockCopy, elapsed_s: float) -> None:
        self._copy_s += elapsed_s
        self.ladder.costs.copied(len(copy.pairs), elapsed_s)

    def _count(self, what: str, copies: list[BlockCopy]) -> None:
        self._counts[what] += len(copies)
        self._counts["swap_blocks"] += sum(len(copy.pairs) for copy in copies)
