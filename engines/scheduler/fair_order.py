"""Who goes first when several tenants wait: the one that has been served least. Pure.

Overdue sequences first, then by priority. Among equals the tenant with the fewest tokens served goes first, and within
a tenant the order of `policy.order_key`. After the virtual token counter (Sheng et al., OSDI 2024): a tenant that comes
back, or is new, starts at the least served of those that waited meanwhile; nobody saves up a claim while away.

Nobody starves: who waits longer than `STARVATION_S` is overdue; among the overdue every service raises its tenant's
counter, so the counter of the one passed over becomes the least.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from engines.scheduler.policy import order_key
from engines.sequence import Sequence

MAX_REMEMBERED: Final = 4096  # tenants


class FairOrder:
    """Owned by one scheduler."""

    def __init__(self) -> None:
        self._served_tokens: dict[str, int] = {}
        self._waited: set[str] = set()
        self._floor = 0

    def served(self, sequence: Sequence, num_tokens: int) -> None:
        """`num_tokens` of it were taken into a step."""
        self._served_tokens[sequence.tenant] = self._served_tokens.get(sequence.tenant, self._floor) + num_tokens

    def of(self, waiting: Iterable[Sequence], now_s: float) -> Iterator[Sequence]:
        """All of `waiting`, each next one by what has been served until it is asked for."""
        queues: dict[str, deque[Sequence]] = {}
        for sequence in sorted(waiting, key=lambda sequence: order_key(sequence, now_s)):
            queues.setdefault(sequence.tenant, deque()).append(sequence)
        self._lift(queues.keys())
        while queues:
            tenant = min(queues, key=lambda tenant: self._key(queues[tenant][0], now_s))
            queue = queues[tenant]
            yield queue.popleft()
            if not queue:
                del queues[tenant]

    def _key(self, first: Sequence, now_s: float) -> tuple[float, ...]:
        is_in_time, urgency, *rest = order_key(first, now_s)
        served = self._served_tokens[first.tenant]
        return (is_in_time, urgency, served, *rest) if is_in_time else (is_in_time, served, urgency, *rest)

    def _lift(self, tenants: Iterable[str]) -> None:
        waiting = set(tenants)
        stayed = [self._served_tokens[tenant] for tenant in waiting & self._waited]
        if stayed:
            self._floor = max(self._floor, min(stayed))
        if len(self._served_tokens) > MAX_REMEMBERED:
            known = self._served_tokens.items()
            self._served_tokens = {t: n for t, n in known if t in waiting or n > self._floor}
        for tenant in waiting - self._waited:
            self._served_tokens[tenant] = max(self._served_tokens.get(tenant, 0), self._floor)
        self._waited = waiting
