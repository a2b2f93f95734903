"""Wake-ups in hand: messages that came and are not claimed yet, in order of arrival."""

from __future__ import annotations

from dataclasses import dataclass, field

from tasks.front.ports import JobPort


@dataclass
class Hand:
    """One request and the Celery tasks that woke us for it: a repeated wake-up joins the first.

    `is_suspect`: it is claimed, and must run alone.
    """

    rid: str
    jobs: list[JobPort] = field(default_factory=list)
    is_suspect: bool = False


class Hands:
    """Output thread."""

    def __init__(self) -> None:
        self._by_rid: dict[str, Hand] = {}

    def __len__(self) -> int:
        return len(self._by_rid)

    def add(self, job: JobPort) -> None:
        self._by_rid.setdefault(job.rid, Hand(job.rid)).jobs.append(job)

    def take_oldest(self) -> Hand:
        """There is one."""
        return self._by_rid.pop(next(iter(self._by_rid)))

    def remove(self, rid: str) -> Hand | None:
        return self._by_rid.pop(rid, None)

    def take_all(self) -> list[Hand]:
        hands, self._by_rid = list(self._by_rid.values()), {}
        return hands
