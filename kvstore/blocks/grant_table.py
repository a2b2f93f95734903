"""Receiver's side of grants: which blocks are promised to which transfer, and when they are free again.

Pure: messages and `now_s` in, actions out. The owner sends the messages and moves blocks to and from the pool.

    late GRANT, late write (the race that QUARANTINED is for)
    P: RESERVE x1 -> D                          D: GRANT g1 (delayed on the way)
    P: no GRANT in time: closes x1, tries D2
    D: lease of g1 over -> QUARANTINED, FENCE(x1, g1) every 0.5 s
    P: x1 is closed for good, nothing in flight -> FENCED(g1)
    D: blocks of g1 are FREE, given to another sequence
    P: GRANT g1 arrives at last: x1 is closed, so it is not used
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kvstore.blocks.errors import GrantError
from kvstore.blocks.grant_actions import (
    Action,
    AskEngine,
    BlocksReleased,
    Delivered,
    SendFence,
    SendGrant,
    SendHanded,
    SendRefused,
    Verify,
)
from kvstore.blocks.grant_states import GrantEvent, GrantState, advance

GRANT_LEASE_S = 5.0
FENCE_EVERY_S = 0.5
MAX_OPEN_PER_PEER = 256
MAX_REMEMBERED = 4096  # ended transfers whose result a repeated COMMIT may still ask for (it is repeated for 3 s)
_HELD: Final = tuple(state.value for state in GrantState if state is not GrantState.FREE)


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a writer asks for: one all-or-nothing grant.

    `part`: of each block, where several writers fill the same blocks; "" is all of it.
    """

    xfer: str
    rid: str
    epoch: int
    token: str
    num_blocks: int
    part: str = ""


@dataclass(slots=True, eq=False)
class Grant:
    """Blocks promised to one transfer. Only `GrantTable` changes it."""

    reservation: Reservation
    peer: int
    grant_id: str
    serial: int
    blocks: tuple[int, ...]
    lease_ends_s: float
    state: GrantState = GrantState.LEASED
    is_verifying: bool = False  # COMMIT came; the verdict is the next event, whatever else happens meanwhile
    quarantined_at_s: float = 0.0
    next_fence_s: float = 0.0


@dataclass(slots=True)
class _Pending:
    """A reservation that waits for the engine's answer. `is_open`: the writer still wants it."""

    reservation: Reservation
    peer: int
    is_open: bool = True


class GrantTable:
    """All grants of one engine life. Owned by one thread. A grant id is never used twice."""

    def __init__(
        self, incarnation: str, *, lease_s: float = GRANT_LEASE_S, fence_every_s: float = FENCE_EVERY_S
    ) -> None:
        self._incarnation = incarnation
        self._lease_s = lease_s
        self._fence_every_s = fence_every_s
        self._serial = 0
        self._pending: dict[str, _Pending] = {}
        self._grants: dict[str, Grant] = {}  # xfer -> LEASED, COMMITTED or QUARANTINED
        self._by_serial: dict[int, Grant] = {}
        self._results: OrderedDict[str, str] = OrderedDict()  # xfer -> "" (handed) or the reason of the refusal

    # ---------------------------------------------------------------- asking
    def find(self, xfer: str) -> Grant | None:
        return self._grants.get(xfer)

    def find_serial(self, serial: int) -> Grant | None:
        return self._by_serial.get(serial)

    def reservation(self, xfer: str) -> Reservation:
        """Of a transfer that waits for the engine's answer."""
        return self._pending[xfer].reservation

    def blocks_by_state(self) -> dict[str, int]:
        counts = dict.fromkeys(_HELD, 0)
        for grant in self._grants.values():
            counts[grant.state] += len(grant.blocks)
        return counts

    def overdue(self, now_s: float, *, after_s: float) -> list[Grant]:
        """Grants whose writer has left FENCE unanswered for `after_s`: kill it, or raise an alert."""
        quarantined = (grant for grant in self._grants.values() if grant.state is GrantState.QUARANTINED)
        return [grant for grant in quarantined if now_s - grant.quarantined_at_s >= after_s]

    def next_due_s(self) -> float | None:
        """When `tick` has something to do, or None."""
        times = [
            grant.lease_ends_s if grant.state is GrantState.LEASED else grant.next_fence_s
            for grant in self._grants.values()
            if grant.state is not GrantState.COMMITTED and not grant.is_verifying
        ]
        return min(times, default=None)

    # ---------------------------------------------------------------- messages of the writer
    def on_reserve(self, reservation: Reservation, peer: int) -> list[Action]:
        """RESERVE. The same transfer again gets the same grant; one that ended is refused."""
        xfer = reservation.xfer
        grant, pending = self._grants.get(xfer), self._pending.get(xfer)
        holder = grant or pending
        if holder is not None and holder.peer != peer:
            return [SendRefused(peer, xfer, "duplicate")]  # somebody else's transfer id: a bug or a forgery
        if grant is not None:
            return [self._grant_message(grant)] if grant.state is GrantState.LEASED else []
        if pending is not None:
            return []
        if xfer in self._results:
            return [SendRefused(peer, xfer, self._results[xfer] or "ended")]
        if self._num_open(peer) >= MAX_OPEN_PER_PEER:
            return [SendRefused(peer, xfer, "quota")]
        self._pending[xfer] = _Pending(reservation, peer)
        return [AskEngine(xfer)]

    def on_commit(self, xfer: str, grant_id: str, peer: int) -> list[Action]:
        """COMMIT: the writer's promise to write no more. Repeated until it is answered."""
        grant = self._grants.get(xfer)
        if grant is None:
            return self._repeat_result(xfer, peer)
        if grant.peer != peer or grant.grant_id != grant_id:
            return [SendRefused(peer, xfer, "unknown_grant")]
        if grant.is_verifying or grant.state is GrantState.COMMITTED:
            return []
        grant.is_verifying = True
        return [Verify(xfer)]

    def on_writer_done(self, xfer: str, peer: int) -> list[Action]:
        """ABORT or FENCED: the last write is complete, and the transfer is closed at the writer for good."""
        pending = self._pending.get(xfer)
        if pending is not None and pending.peer == peer:
            pending.is_open = False
        grant = self._grants.get(xfer)
        if grant is None or grant.peer != peer or grant.is_verifying:
            return []
        return self._apply(grant, GrantEvent.WRITER_DONE, "aborted")

    def on_renew(self, xfers: list[str], peer: int, now_s: float) -> None:
        """The writer's engine is alive and still wants these; a lease that is over stays over."""
        for xfer in xfers:
            grant = self._grants.get(xfer)
            if grant is not None and grant.peer == peer and grant.state is GrantState.LEASED:
                grant.lease_ends_s = now_s + self._lease_s

    # ---------------------------------------------------------------- the channel
    def on_unreachable(self, peer: int, now_s: float) -> list[Action]:
        """The writer is silent. Nothing is freed: it may still write."""
        return self._apply_all(peer, GrantEvent.UNREACHABLE, now_s, "unreachable")

    def on_channel_dead(self, peer: int) -> list[Action]:
        """Proven: nothing can arrive over this channel any more. Committed grants are not touched."""
        for pending in self._pending.values():
            if pending.peer == peer:
                pending.is_open = False
        return self._apply_all(peer, GrantEvent.CHANNEL_DEAD, 0.0, "channel_dead")

    # ---------------------------------------------------------------- words of the engine, verdicts, time
    def answer(self, xfer: str, blocks: list[int] | None, now_s: float, *, reason: str = "") -> list[Action]:
        """The engine's answer to `AskEngine`; None refuses.

        Raises:
            GrantError: nobody asked, or the number of blocks is not what was asked for.
        """
        pending = self._pending.get(xfer)
        if pending is None:
            raise GrantError(xfer=xfer, why="no reservation waits for an answer")
        if blocks is not None and len(blocks) != pending.reservation.num_blocks:
            raise GrantError(xfer=xfer, why=f"{len(blocks)} blocks for a request of {pending.reservation.num_blocks}")
        del self._pending[xfer]
        if blocks is None:
            return [SendRefused(pending.peer, xfer, reason or "no_space")] if pending.is_open else []
        if not pending.is_open:
            # No GRANT was ever sent, so nobody can write: free at once.
            return [BlocksReleased(xfer, tuple(blocks))]
        self._serial += 1
        grant_id = f"{self._incarnation}.{self._serial}"
        lease_ends_s = now_s + self._lease_s
        grant = Grant(pending.reservation, pending.peer, grant_id, self._serial, tuple(blocks), lease_ends_s)
        grant.state = advance(GrantState.FREE, GrantEvent.RESERVED)
        self._grants[xfer] = self._by_serial[self._serial] = grant
        return [self._grant_message(grant)]

    def verdict(self, xfer: str, *, is_good: bool, reason: str = "") -> list[Action]:
        """Result of a `Verify`."""
        grant = self._grants.get(xfer)
        if grant is None or not grant.is_verifying:
            raise GrantError(xfer=xfer, why="no COMMIT of it is being verified")
        grant.is_verifying = False
        event = GrantEvent.COMMIT_GOOD if is_good else GrantEvent.COMMIT_BAD
        why = "fenced" if is_good else reason
        return self._apply(grant, event, why, SendRefused(grant.peer, xfer, why))

    def settle(self, xfer: str, *, is_handed: bool, now_s: float) -> list[Action]:
        """The engine's word after `handoff`. Before COMMITTED, `is_handed=False` cancels: the writer is fenced."""
        grant = self._grants.get(xfer)
        if grant is None:
            return []
        if grant.state is not GrantState.COMMITTED:
            if is_handed:
                raise GrantError(xfer=xfer, why=f"handed over while {grant.state}")
            return self._apply_at(grant, GrantEvent.CANCELLED, now_s, "cancelled")
        if is_handed:
            return self._apply(grant, GrantEvent.HANDED, "", SendHanded(grant.peer, xfer))
        return self._apply(grant, GrantEvent.HANDOFF_REFUSED, "handoff", SendRefused(grant.peer, xfer, "handoff"))

    def tick(self, now_s: float) -> list[Action]:
        """Leases that are over, fences that are due."""
        actions: list[Action] = []
        for grant in list(self._grants.values()):
            if grant.is_verifying:
                continue
            if grant.state is GrantState.LEASED and now_s >= grant.lease_ends_s:
                actions += self._apply_at(grant, GrantEvent.LEASE_OVER, now_s, "lease_over")
            if grant.state is GrantState.QUARANTINED and now_s >= grant.next_fence_s:
                grant.next_fence_s = now_s + self._fence_every_s
                actions.append(SendFence(grant.peer, grant.reservation.xfer, grant.grant_id))
        return actions

    def check_invariants(self) -> None:
        """No part of a block in two grants, no free grant in the table, both indexes agree.

        Raises:
            AssertionError: a bug; the message names the block or the transfer.
        """
        holders: dict[tuple[int, str], str] = {}
        for xfer, grant in self._grants.items():
            assert grant.reservation.xfer == xfer, f"{xfer} holds the grant of {grant.reservation.xfer}"
            assert grant.state is not GrantState.FREE, f"{xfer} is free and still known"
            assert self._by_serial.get(grant.serial) is grant, f"{xfer} is not found by its serial"
            assert not grant.is_verifying or grant.state is not GrantState.COMMITTED, f"{xfer} is verified twice"
            assert xfer not in self._pending, f"{xfer} is granted and waits for a grant"
            for block_id in grant.blocks:
                key = (block_id, grant.reservation.part)
                assert key not in holders, f"block {block_id} is granted to {holders[key]} and {xfer}"
                holders[key] = xfer
        assert len(self._by_serial) == len(self._grants), "a serial outlives its grant"

    # ---------------------------------------------------------------- private
    def _grant_message(self, grant: Grant) -> SendGrant:
        return SendGrant(grant.peer, grant.reservation.xfer, grant.grant_id, grant.serial, grant.blocks)

    def _num_open(self, peer: int) -> int:
        granted = sum(grant.peer == peer for grant in self._grants.values())
        return granted + sum(pending.peer == peer for pending in self._pending.values())

    def _repeat_result(self, xfer: str, peer: int) -> list[Action]:
        result = self._results.get(xfer)
        if result == "":
            return [SendHanded(peer, xfer)]
        return [SendRefused(peer, xfer, result or "unknown_grant")]

    def _apply_all(self, peer: int, event: GrantEvent, now_s: float, result: str) -> list[Action]:
        actions: list[Action] = []
        for grant in list(self._grants.values()):
            if grant.peer == peer and not grant.is_verifying:
                actions += self._apply_at(grant, event, now_s, result)
        return actions

    def _apply_at(self, grant: Grant, event: GrantEvent, now_s: float, result: str) -> list[Action]:
        was = grant.state
        actions = self._apply(grant, event, result)
        if grant.state is GrantState.QUARANTINED and was is not GrantState.QUARANTINED:
            grant.quarantined_at_s = grant.next_fence_s = now_s
        return actions

    def _apply(self, grant: Grant, event: GrantEvent, result: str, reply: Action | None = None) -> list[Action]:
        """Advance. On FREE: forget the grant, remember `result`, send `reply`, release blocks unless handed over."""
        grant.state = advance(grant.state, event)
        xfer = grant.reservation.xfer
        if grant.state is GrantState.COMMITTED and event is GrantEvent.COMMIT_GOOD:
            return [Delivered(xfer)]
        if grant.state is not GrantState.FREE:
            return []
        del self._grants[xfer], self._by_serial[grant.serial]
        self._results[xfer] = result
        if len(self._results) > MAX_REMEMBERED:
            self._results.popitem(last=False)
        actions = [] if reply is None else [reply]
        if event is not GrantEvent.HANDED:
            actions.append(BlocksReleased(xfer, grant.blocks))
        return actions
