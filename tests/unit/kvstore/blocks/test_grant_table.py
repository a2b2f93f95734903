"""The grant table in virtual time: each row of the protocol's table, and the races b and c."""

from __future__ import annotations

import pytest

from kvstore.blocks import (
    TRANSITIONS,
    AskEngine,
    BlocksReleased,
    Delivered,
    GrantError,
    GrantState,
    GrantTable,
    Reservation,
    SendFence,
    SendGrant,
    SendHanded,
    SendRefused,
    Verify,
)
from kvstore.blocks.grant_table import MAX_OPEN_PER_PEER

PEER = 7


def ask(xfer: str = "x1", num_blocks: int = 2) -> Reservation:
    return Reservation(xfer, "rid", 3, "tok", num_blocks)


def make(xfer: str = "x1", blocks: tuple[int, ...] = (4, 5)) -> tuple[GrantTable, SendGrant]:
    """A table with one LEASED grant, made at 0 s."""
    table = GrantTable("d0")
    assert table.on_reserve(ask(xfer, len(blocks)), PEER) == [AskEngine(xfer)]
    (grant,) = table.answer(xfer, list(blocks), 0.0)
    assert isinstance(grant, SendGrant)
    return table, grant


def committed() -> GrantTable:
    table, grant = make()
    assert table.on_commit("x1", grant.grant_id, PEER) == [Verify("x1")]
    assert table.verdict("x1", is_good=True) == [Delivered("x1")]
    return table


def test_the_same_reservation_gets_the_same_grant() -> None:
    table, grant = make()
    assert table.on_reserve(ask(), PEER) == [grant]


def test_a_reservation_waits_for_the_engine_once() -> None:
    table = GrantTable("d0")
    assert table.on_reserve(ask(), PEER) == [AskEngine("x1")]
    assert table.on_reserve(ask(), PEER) == []
    assert table.answer("x1", None, 0.0, reason="no_space") == [SendRefused(PEER, "x1", "no_space")]
    with pytest.raises(GrantError):
        table.answer("x1", [1, 2], 0.0)


def test_a_grant_id_is_never_used_twice() -> None:
    table, first = make()
    table.on_writer_done("x1", PEER)
    table.on_reserve(ask("x2"), PEER)
    (second,) = table.answer("x2", [4, 5], 0.0)
    assert isinstance(second, SendGrant)
    assert second.grant_id != first.grant_id


def test_an_ended_transfer_gets_no_second_grant() -> None:
    table, _ = make()
    table.on_writer_done("x1", PEER)
    assert table.on_reserve(ask(), PEER) == [SendRefused(PEER, "x1", "aborted")]


def test_a_timeout_never_frees_but_fences_until_the_writer_answers() -> None:
    table, grant = make()
    assert table.tick(4.9) == []
    assert table.tick(5.0) == [SendFence(PEER, "x1", grant.grant_id)]
    assert table.tick(5.3) == []
    assert table.tick(5.5) == [SendFence(PEER, "x1", grant.grant_id)]
    assert table.tick(3600.0) == [SendFence(PEER, "x1", grant.grant_id)]
    assert table.blocks_by_state()["QUARANTINED"] == 2
    assert [g.reservation.xfer for g in table.overdue(8.0, after_s=3.0)] == ["x1"]
    assert table.on_writer_done("x1", PEER) == [BlocksReleased("x1", (4, 5))]
    assert table.next_due_s() is None


def test_a_live_writer_keeps_its_lease() -> None:
    table, _ = make()
    table.on_renew(["x1", "x404"], PEER, 4.0)
    assert table.tick(8.9) == []
    assert len(table.tick(9.0)) == 1
    table.on_renew(["x1"], PEER, 9.1)  # too late: what is fenced stays fenced
    assert table.blocks_by_state()["LEASED"] == 0


def test_a_commit_that_crossed_the_fence_frees_and_is_refused() -> None:
    table, grant = make()
    table.tick(5.0)
    table.on_commit("x1", grant.grant_id, PEER)
    assert table.verdict("x1", is_good=True) == [SendRefused(PEER, "x1", "fenced"), BlocksReleased("x1", (4, 5))]


def test_a_wrong_checksum_frees_because_the_writer_is_done() -> None:
    table, grant = make()
    table.on_commit("x1", grant.grant_id, PEER)
    released = BlocksReleased("x1", (4, 5))
    assert table.verdict("x1", is_good=False, reason="checksum") == [SendRefused(PEER, "x1", "checksum"), released]


def test_after_commit_neither_abort_nor_death_of_the_writer_frees() -> None:
    table = committed()
    assert table.on_writer_done("x1", PEER) == []
    assert table.on_channel_dead(PEER) == []
    assert table.on_unreachable(PEER, 9.0) == []
    assert table.tick(100.0) == []
    assert table.blocks_by_state()["COMMITTED"] == 2


def test_death_of_the_writer_during_the_check_does_not_lose_the_commit() -> None:
    table, grant = make()
    table.on_commit("x1", grant.grant_id, PEER)
    assert table.on_channel_dead(PEER) == []
    assert table.tick(60.0) == []
    assert table.verdict("x1", is_good=True) == [Delivered("x1")]


def test_handed_blocks_are_not_released_and_a_repeated_commit_is_answered() -> None:
    table = committed()
    assert table.settle("x1", is_handed=True, now_s=1.0) == [SendHanded(PEER, "x1")]
    assert table.on_commit("x1", "d0.1", PEER) == [SendHanded(PEER, "x1")]
    assert table.settle("x1", is_handed=True, now_s=1.0) == []


def test_a_refused_handoff_releases_and_is_repeated() -> None:
    table = committed()
    refused = SendRefused(PEER, "x1", "handoff")
    assert table.settle("x1", is_handed=False, now_s=1.0) == [refused, BlocksReleased("x1", (4, 5))]
    assert table.on_commit("x1", "d0.1", PEER) == [refused]


def test_only_the_peer_that_holds_a_grant_can_end_it() -> None:
    table, grant = make()
    assert table.on_writer_done("x1", PEER + 1) == []
    assert table.on_commit("x1", grant.grant_id, PEER + 1) == [SendRefused(PEER + 1, "x1", "unknown_grant")]
    assert table.on_reserve(ask(), PEER + 1) == [SendRefused(PEER + 1, "x1", "duplicate")]
    assert table.on_channel_dead(PEER + 1) == []
    assert table.blocks_by_state()["LEASED"] == 2


def test_a_commit_of_another_grant_is_refused_and_changes_nothing() -> None:
    table, _ = make()
    assert table.on_commit("x1", "d0.99", PEER) == [SendRefused(PEER, "x1", "unknown_grant")]
    assert table.blocks_by_state()["LEASED"] == 2


def test_a_cancel_fences_at_once() -> None:
    table, grant = make()
    assert table.settle("x1", is_handed=False, now_s=1.0) == []
    assert table.tick(1.0) == [SendFence(PEER, "x1", grant.grant_id)]


def test_proven_death_frees_what_is_leased_or_quarantined() -> None:
    table, _ = make()
    assert table.on_channel_dead(PEER) == [BlocksReleased("x1", (4, 5))]


def test_blocks_for_a_writer_that_is_gone_come_straight_back() -> None:
    table = GrantTable("d0")
    table.on_reserve(ask(), PEER)
    table.on_channel_dead(PEER)
    assert table.answer("x1", [1, 2], 0.0) == [BlocksReleased("x1", (1, 2))]


def test_one_peer_cannot_take_every_grant() -> None:
    table = GrantTable("d0")
    for i in range(MAX_OPEN_PER_PEER):
        table.on_reserve(ask(f"x{i}"), PEER)
    assert table.on_reserve(ask("one-more"), PEER) == [SendRefused(PEER, "one-more", "quota")]
    assert table.on_reserve(ask("other"), PEER + 1) == [AskEngine("other")]


def test_every_state_can_reach_free() -> None:
    reached = {GrantState.FREE}
    for _ in GrantState:
        reached |= {state for state, moves in TRANSITIONS.items() if reached & set(moves.values())}
    assert reached == set(GrantState)
