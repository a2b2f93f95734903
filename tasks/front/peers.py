"""The decode workers that a prefill worker may hand to, best first. Output thread only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engines.messages import Target
from kvstore.link_report import LinkReport
from kvstore.state.records import WorkerBeat
from tasks.routing import rank_targets


class PeerTable:
    """Refreshed from the registry each 0.5 s; between two refreshes it counts what was sent where."""

    def __init__(self, *, model: str) -> None:
        self._model = model
        self._compat = ""
        self._host_id = ""
        self._beats: list[WorkerBeat] = []
        self._assigned: Counter[str] = Counter()
        self._told: list[Target] = []
        self._links: Sequence[LinkReport] = ()
        self.targets: list[Target] = []

    def set_own(self, *, compat: str, host_id: str) -> None:
        """What our engine is: only those that agree with it can take its KV. The new engine has been told nothing."""
        self._compat, self._host_id, self._told = compat, host_id, []

    def refresh(self, beats: list[WorkerBeat], links: Sequence[LinkReport] = ()) -> None:
        """The registry's workers, and what our engine knows of its links."""
        self._beats, self._links = beats, links
        self._assigned.clear()
        self._rank()

    def assign(self, node: str) -> None:
        """A sequence goes to `node`; its next beat will show it."""
        self._assigned[node] += 1
        self._rank()

    def take_order_if_new(self) -> bool:
        """Whether the engine has not been told this order yet; it is taken as told now."""
        if self.targets == self._told:
            return False
        self._told = list(self.targets)
        return True

    def _rank(self) -> None:
        self.targets = rank_targets(
            self._beats,
            model=self._model,
            compat=self._compat,
            host_id=self._host_id,
            assigned=self._assigned,
            links=self._links,
        )
