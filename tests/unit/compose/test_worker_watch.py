from __future__ import annotations

from typing import Any

import configs
from compose.worker_watch import WorkerWatch
from kvstore.address import KVAddress
from kvstore.clock import VirtualClock
from kvstore.errors import StateUnavailable
from kvstore.state.records import WorkerBeat
from kvstore.state.replies import Evicted, Turn


class FakeStore:
    """A registry and a list of who was evicted."""

    def __init__(self) -> None:
        self.beats: list[WorkerBeat] = []
        self.evicted: list[str] = []
        self.is_down = False

    def workers(self) -> list[WorkerBeat]:
        self._answer()
        return self.beats

    def evict(self, incarnation: str, evidence: str) -> Evicted:
        self._answer()
        assert evidence == "exited"
        self.evicted.append(incarnation)
        return Evicted([Turn("r-s00", 2)], 1)

    def retire(self, incarnation: str) -> None:
        self._answer()
        self.beats = [beat for beat in self.beats if beat.incarnation != incarnation]

    def _answer(self) -> None:
        if self.is_down:
            raise StateUnavailable(command="x", reason="connection", detail="refused")


class FakeSender:
    def __init__(self) -> None:
        self.turns: list[Turn] = []

    def send(self, turns: Any, store: Any) -> None:  # noqa: ARG002
        self.turns += turns


def beat(incarnation: str, pid: int) -> WorkerBeat:
    address = KVAddress(incarnation=incarnation, host_id="h", tcp_host="127.0.0.1", tcp_port=1)
    return WorkerBeat(incarnation=incarnation, node="d0@h", role="decode", model="m", address=address, pid=pid)


def make_watch() -> tuple[WorkerWatch, FakeStore, FakeSender, VirtualClock]:
    store, sender, clock = FakeStore(), FakeSender(), VirtualClock()
    watch = WorkerWatch(configs.load(env={"HOME": "/h"}), store, clock)  # type: ignore[arg-type]
    watch._sender = sender
    return watch, store, sender, clock


def test_a_dead_worker_is_evicted_and_its_requests_are_woken() -> None:
    watch, store, sender, _ = make_watch()
    store.beats = [beat("d0@h-1", 100), beat("d1@h-1", 101)]
    watch.poll()

    watch.died(100)

    assert store.evicted == ["d0@h-1"]
    assert sender.turns == [Turn("r-s00", 2)]
    assert [b.incarnation for b in store.beats] == ["d1@h-1"]


def test_every_life_that_a_process_has_had_is_evicted() -> None:
    watch, store, _, clock = make_watch()
    store.beats = [beat("d0@h-1", 100)]
    watch.poll()
    clock.advance(1.0)
    store.beats = [beat("d0@h-2", 100)]  # its engine was replaced; the supervisor has not looked since

    watch.died(100)

    assert sorted(store.evicted) == ["d0@h-1", "d0@h-2"]


def test_an_eviction_that_the_state_server_missed_is_repeated() -> None:
    watch, store, sender, clock = make_watch()
    store.beats = [beat("d0@h-1", 100)]
    watch.poll()
    store.is_down = True
    watch.died(100)
    assert store.evicted == []

    store.is_down = False
    clock.advance(1.0)
    watch.poll()

    assert store.evicted == ["d0@h-1"]
    assert len(sender.turns) == 1


def test_a_process_that_never_beat_has_nothing_to_evict() -> None:
    watch, store, _, _ = make_watch()
    watch.died(100)
    assert store.evicted == []
