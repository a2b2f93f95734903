"""The decode workers that a prefill worker may hand to, best first, and the caches of others. Output thread only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from engines.messages import Peers, Target
from kvstore.address import KVAddress
from kvstore.link_report import LinkReport
from kvstore.state.records import WorkerBeat
from tasks.routing import find_caches, rank_targets


class PeerTable:
    """Refreshed from the registry each 0.5 s; between two refreshes it counts what was sent where."""

    def __init__(self, *, model: str) -> None:
        self._model = model
        self._compat = ""
        self._host_id = ""
        self._beats: list[WorkerBeat] = []
        self._assigned: Counter[str] = Counter()
        self._incarnation = ""
        self._told: tuple[list[Target], list[Target]] = ([], [])
        self._links: Sequence[LinkReport] = ()
        self.targets: list[Target] = []
        self.caches: list[Target] = []

    def set_own(self, address: KVAddress) -> None:
        """What our engine is: only those that agree with it can take its KV. The new engine has been told nothing."""
        self._compat, self._host_id, self._told = address.compat, address.host_id, ([], [])
        self._incarnation = address.incarnation

    def refresh(self, beats: list[WorkerBeat], links: Sequence[LinkReport] = ()) -> None:
        """The registry's workers, and what our engine knows of its links."""
        self._beats, self._links = beats, links
        self._assigned.clear()
        self.caches = find_caches(beats, model=self._model, compat=self._compat, incarnation=self._incarnation)
        self._rank()

    def assign(self, node: str) -> None:
        """A sequence goes to `node`; its next beat will show it."""
        self._assigned[node] += 1
        self._rank()

    def take_order_if_new(self) -> bool:
        """Whether the engine has not been told these workers in this order yet; it is taken as told now."""
        if (self.targets, self.caches) == self._told:
            return False
        self._told = (list(self.targets), list(self.caches))
        return True

    def message(self) -> Peers:
        """What the engine is told."""
        return Peers(self.targets, self.caches)

    def _rank(self) -> None:
        ranked = rank_targets(
            self._beats,
            model=self._model,
            compat=self._compat,
            host_id=self._host_id,
            assigned=self._assigned,
            links=self._links,
        )
        self.targets = [target for target in ranked if target.address.incarnation != self._incarnation]
