"""What an outage writes into a log, in virtual time."""

from __future__ import annotations

import logging

import pytest

from kvstore.outage import REPEAT_EVERY_S, OutageLog

LOG = logging.getLogger("test.outage")


class Rig:
    def __init__(self) -> None:
        self.now_s = 100.0
        self.outage = OutageLog(LOG, "state server", clock=lambda: self.now_s)

    def fail(self, times: int, every_s: float) -> None:
        for _ in range(times):
            self.outage.failed("renew", "timeout")
            self.now_s += every_s


@pytest.fixture
def rig() -> Rig:
    return Rig()


def _lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_an_outage_is_told_once_and_its_end_with_a_count(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.fail(times=40, every_s=0.2)
    rig.outage.answered()
    rig.outage.answered()

    assert _lines(caplog) == [
        "state server: no answer to renew (timeout); calls are repeated; 1 failed",
        "state server: answers again after 8.0 s; 39 more calls failed",
    ]


def test_a_long_outage_is_told_again_every_ten_seconds(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.fail(times=60, every_s=0.5)

    lines = _lines(caplog)
    assert len(lines) == 3
    assert lines[1].endswith(f"{round(REPEAT_EVERY_S / 0.5)} failed")


def test_a_server_that_comes_and_goes_does_not_fill_the_log(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        rig.fail(times=1, every_s=0.1)
        rig.outage.answered()

    assert len(_lines(caplog)) == 2


def test_no_outage_no_line(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(100):
        rig.outage.answered()

    assert _lines(caplog) == []
