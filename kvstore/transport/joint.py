"""Blocks that several writers fill, each its own heads: the engine grants them once and sees them arrive once. Pure.

    heads [0, 2) ── RESERVE x0 of g ─▶┬─ one ReserveRequested ─┬─ GRANT x0 ─ pages ─ COMMIT x0 ─┬─▶ one Arrived
    heads [2, 4) ── RESERVE x1 of g ─▶┘                        └─ GRANT x1 ─ pages ─ COMMIT x1 ─┘

Each member has a grant of its own, over the same blocks, with its own states, lease and fence. If one is lost, all are
cancelled, and also if one stays away after the others have committed; the blocks are free when the last member can
write no more.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from kvstore.blocks import Reservation
from kvstore.reshard.plan import HeadShare

PREFIX: Final = "group:"  # of what the engine calls it; no writer's transfer is called so
MAX_ENDED: Final = 1024


@dataclass(slots=True)
class Member:
    share: HeadShare
    is_delivered: bool = False


@dataclass(slots=True, eq=False)
class Group:
    """`blocks`: None until the engine has granted them. `is_over`: it arrives no more, or was handed over.

    `incomplete_since_s`: a member has committed, and not all heads are there.
    """

    xfer: str
    reservation: Reservation  # of its first member
    members: dict[str, Member] = field(default_factory=dict)  # by transfer: those that wait or hold a grant
    blocks: tuple[int, ...] | None = None
    is_asked: bool = False
    is_over: bool = False
    incomplete_since_s: float | None = None

    def num_heads(self) -> int:
        """Heads that have arrived."""
        return sum(member.share.num_heads for member in self.members.values() if member.is_delivered)


class JointGrants:
    """Owned by the `kv` thread."""

    def __init__(self) -> None:
        self._groups: dict[str, Group] = {}  # by `Group.xfer`
        self._by_member: dict[str, Group] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()

    def join(self, name: str, reservation: Reservation, share: HeadShare) -> str:
        """Add a member. Returns why it cannot be one, or ""."""
        xfer = PREFIX + name
        if reservation.xfer in self._by_member:
            return "" if self._by_member[reservation.xfer].xfer == xfer else "group"
        if xfer in self._ended:
            return "ended"
        group = self._groups.get(xfer)
        if group is None:
            group = self._groups[xfer] = Group(xfer, reservation)
        first = group.reservation
        facts = [(r.rid, r.epoch, r.token, r.num_blocks) for r in (first, reservation)]
        if facts[0] != facts[1] or any(_overlap(share, member.share) for member in group.members.values()):
            return "group"  # of another request, or the same heads twice
        if group.is_over:
            return "ended"
        group.members[reservation.xfer] = Member(share)
        self._by_member[reservation.xfer] = group
        return ""

    def of_member(self, xfer: str) -> Group | None:
        return self._by_member.get(xfer)

    def find(self, xfer: str) -> Group | None:
        """By the name that the engine knows."""
        return self._groups.get(xfer)

    def stale(self, before_s: float) -> list[Group]:
        """Those that have been incomplete since before that time."""
        return [
            g for g in self._groups.values() if g.incomplete_since_s is not None and g.incomplete_since_s < before_s
        ]

    def leave(self, xfer: str) -> Group | None:
        """This member can write no more. Returns its group if that was the last one; the group is forgotten then."""
        group = self._by_member.pop(xfer, None)
        if group is None:
            return None
        del group.members[xfer]
        group.is_over = True
        if group.members:
            return None
        del self._groups[group.xfer]
        self._ended[group.xfer] = None
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)
        return group


def _overlap(a: HeadShare, b: HeadShare) -> bool:
    return a.dst_lo < b.dst_lo + b.num_heads and b.dst_lo < a.dst_lo + a.num_heads
