from __future__ import annotations

import logging
import signal

import pytest

from compose.overdue_writers import OverdueWriters, engines_to_end
from kvstore.address import KVAddress
from kvstore.overdue import OverdueWriter
from kvstore.state.records import WorkerBeat


def beat(
    incarnation: str, pid: int, engine_pid: int, *, host_id: str = "h", overdue: list[OverdueWriter] | None = None
) -> WorkerBeat:
    address = KVAddress(incarnation=incarnation, host_id=host_id)
    return WorkerBeat(
        incarnation=incarnation,
        node=incarnation.split("-")[0],
        role="decode",
        model="m",
        address=address,
        host_id=host_id,
        pid=pid,
        engine_pids=[engine_pid],
        overdue_writers=overdue or [],
    )


def writer(peer: str, pid: int) -> OverdueWriter:
    return OverdueWriter(xfer="x:1", peer=peer, pid=pid, num_blocks=8)


def make(is_engine: bool = True) -> tuple[OverdueWriters, list[tuple[int, int]]]:
    kills: list[tuple[int, int]] = []
    return OverdueWriters(is_engine=lambda _: is_engine, kill=lambda pid, sig: kills.append((pid, sig))), kills


def test_the_engine_of_an_own_worker_that_leaves_a_fence_unanswered_is_killed() -> None:
    beats = [beat("p0-1", 100, 200), beat("d0-1", 101, 201, overdue=[writer("p0-1", 200)])]
    overdue, kills = make()

    assert overdue.end(beats, [100, 101]) == [200]
    assert kills == [(200, signal.SIGKILL)]


@pytest.mark.parametrize(
    ("complaint", "why"),
    [
        (writer("p0-1", 999), "a process id that is no engine of that incarnation"),
        (writer("p0-0", 200), "a former life of the worker"),
        (writer("", 200), "a connection that has proven no incarnation"),
        (writer("d0-1", 200), "the engine of another worker"),
    ],
)
def test_only_the_very_engine_complained_of_is_killed(complaint: OverdueWriter, why: str) -> None:
    beats = [beat("p0-1", 100, 200), beat("d0-1", 101, 201, overdue=[complaint])]
    assert engines_to_end(beats, {100, 101}) == {}, why


def test_a_worker_that_somebody_else_started_is_left_alone_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    beats = [beat("p0-1", 100, 200), beat("d0-1", 101, 201, overdue=[writer("p0-1", 200)])]
    overdue, kills = make()

    with caplog.at_level(logging.ERROR):
        overdue.end(beats, [101])
        overdue.end(beats, [101])

    assert kills == []
    assert len(caplog.records) == 1
    assert "p0-1" in caplog.text


def test_a_complaint_from_another_host_kills_nothing_here() -> None:
    beats = [beat("p0-1", 100, 200), beat("d0-1", 101, 201, host_id="far", overdue=[writer("p0-1", 200)])]
    assert engines_to_end(beats, {100, 101}) == {}


def test_a_process_id_that_is_no_engine_any_more_is_left_alone() -> None:
    beats = [beat("p0-1", 100, 200), beat("d0-1", 101, 201, overdue=[writer("p0-1", 200)])]
    overdue, kills = make(is_engine=False)

    assert overdue.end(beats, [100, 101]) == []
    assert kills == []
