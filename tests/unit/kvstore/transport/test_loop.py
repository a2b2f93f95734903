"""Who runs what in the loop of the `kv` thread: a small thing at once, by whoever asks, if nothing is before it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvstore.transport.loop import IDLE_TICK_S, Loop

WITHIN_S = 5.0


class Turning:
    """A loop in a thread of its own. `steps` says for each slice of work whether there is more."""

    def __init__(self) -> None:
        self.loop = Loop(time.monotonic)
        self.steps: list[bool] = []
        self.workers: list[str] = []
        self.ticks: list[float] = []
        self.thread = threading.Thread(target=self._run, name="kv")
        self.thread.start()

    def work(self) -> bool:
        self.workers.append(threading.current_thread().name)
        return self.steps.pop(0) if self.steps else False

    def run_here(self, command: Callable[[], bool]) -> bool:
        return self.loop.run_here(command, self.work)

    def when_idle(self, command: Callable[[], bool]) -> bool:
        """Asks until the loop sleeps."""
        ends_s = time.monotonic() + WITHIN_S
        while not self.run_here(command):
            assert time.monotonic() < ends_s, "the loop does not come to rest"
        return True

    def close(self) -> None:
        self.loop.post(self.loop.stop)
        self.thread.join(WITHIN_S)
        self.loop.close()

    def _run(self) -> None:
        self.loop.run(tick=self._tick, work=self.work, tell=lambda: None)

    def _tick(self, now_s: float) -> bool:
        self.ticks.append(now_s)
        return False


@pytest.fixture
def turning() -> Iterator[Turning]:
    found = Turning()
    yield found
    found.close()


def test_a_command_runs_in_the_thread_that_asks_while_the_loop_sleeps(turning: Turning) -> None:
    ran: list[str] = []

    turning.when_idle(lambda: not ran.append(threading.current_thread().name))  # type: ignore[func-returns-value]

    assert ran == [threading.current_thread().name]
    assert turning.workers[-1] == threading.current_thread().name


def test_a_command_does_not_run_beside_a_turn_of_the_loop(turning: Turning) -> None:
    is_in, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        is_in.set()
        may_go.wait(WITHIN_S)

    turning.loop.post(hold)
    assert is_in.wait(WITHIN_S)
    assert not turning.run_here(lambda: pytest.fail("it ran"))
    may_go.set()


def test_what_is_left_after_a_turn_of_another_thread_is_done_by_the_loop(turning: Turning) -> None:
    turning.when_idle(lambda: True)
    turning.steps = [True, False]
    done = threading.Event()

    turning.when_idle(lambda: True)
    turning.loop.post(done.set)

    assert done.wait(WITHIN_S)
    assert not turning.steps
    assert "kv" in turning.workers


def test_a_command_that_fails_is_heard_where_it_was_asked_and_the_loop_goes_on(turning: Turning) -> None:
    with pytest.raises(ZeroDivisionError):
        turning.when_idle(lambda: bool(1 // 0))

    turning.when_idle(lambda: True)


def test_a_tick_comes_when_it_was_asked_for(turning: Turning) -> None:
    """The next one by itself comes a second after the last."""
    asked_s: list[float] = []

    def ask() -> None:
        asked_s.append(turning.ticks[-1] + IDLE_TICK_S / 4)
        turning.loop.tick_by(asked_s[0])

    turning.when_idle(lambda: bool(turning.ticks))
    turning.loop.post(ask)
    ends_s = time.monotonic() + WITHIN_S
    while len(turning.ticks) < 2 and time.monotonic() < ends_s:
        turning.thread.join(0.01)

    assert asked_s[0] <= turning.ticks[1] < turning.ticks[0] + IDLE_TICK_S
