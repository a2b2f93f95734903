from __future__ import annotations

from pathlib import Path

from compose.backoff import MAX_DELAY_S, STEADY_S, Backoff
from compose.child import TRANSITIONS, Child, ChildEvent, ChildState, exit_text
from compose.layout import ChildSpec
from kvstore.clock import VirtualClock


def test_one_death_costs_no_delay_and_a_row_of_them_waits_longer_each_time() -> None:
    backoff = Backoff()
    assert [backoff.delay_s(ran_s=1.0) for _ in range(5)] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert max(backoff.delay_s(ran_s=1.0) for _ in range(40)) == MAX_DELAY_S


def test_a_process_that_ran_long_starts_afresh() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.delay_s(ran_s=1.0)
    assert backoff.delay_s(ran_s=STEADY_S) == 0.0
    assert backoff.num_restarts == 6


def test_every_state_of_a_child_can_end() -> None:
    for state in ChildState:
        assert state is ChildState.STOPPED or TRANSITIONS[state][ChildEvent.ENDED] is ChildState.STOPPED


def test_a_dead_process_is_seen_once_and_planned_again(tmp_path: Path) -> None:
    clock = VirtualClock()
    spec = ChildSpec("x", "flower", ("/bin/sh", "-c", "echo last words; exit 7"), {})
    child = Child(spec, tmp_path / "x.log", clock)

    statuses = []
    for _ in range(2):
        child.spawn()
        assert child._process is not None
        child._process.wait()
        death = child.poll_death()
        assert death is not None
        statuses.append(death[1])
        assert child.poll_death() is None

    assert statuses == [7, 7]
    assert child.state is ChildState.WAITING
    assert not child.is_due
    clock.advance(0.5)
    assert child.is_due
    assert (tmp_path / "x.log").read_text() == "last words\nlast words\n"


def test_ending_kills_and_nothing_follows(tmp_path: Path) -> None:
    child = Child(ChildSpec("x", "flower", ("/bin/sh", "-c", "exec sleep 60"), {}), tmp_path / "x.log", VirtualClock())
    child.spawn()
    child.end(kill=True)
    child.end(kill=True)
    assert child.state is ChildState.STOPPED
    assert not child.is_alive


def test_exit_statuses_are_told_in_words() -> None:
    assert exit_text(3) == "exit status 3"
    assert exit_text(-9) == "signal 9 (SIGKILL)"
