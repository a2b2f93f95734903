"""Two hosts as far as the kernel can pretend: a slow line, lost packets, a cut cable, a peer gone without a word.

Times are read from one monotonic clock that both ends share, so no test waits for a fixed time to pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvstore.readable import wait_readable
from tests.netns.end import TCP_SILENCE_S
from tests.netns.network import ADDRESSES, Network, why_not
from tests.stopwatch import Stopwatch

ROOT = Path(__file__).parents[2]
CLOSE_S, SILENCE_S, LATE_S = 1.0, 2.0, 0.2  # noticed so long after a close; a silence; a deadline
_reason = why_not()
pytestmark = pytest.mark.skipif(bool(_reason), reason=_reason)


class Process:
    """One `tests.netns.end`. Use as a context; it is killed at the end."""

    def __init__(self, network: Network, side: str, role: str, target: str = "") -> None:
        words = (sys.executable, "-m", "tests.netns.end", role, ADDRESSES[side], *([target] if target else []))
        self._process = subprocess.Popen(
            network.command(side, *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        self._unread = b""
        self.address: str = self._line(120)["address"]

    def tell(self, words: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(words.encode() + b"\n")
        self._process.stdin.flush()

    def wait(self, event: str, *, timeout_s: float = 60.0) -> dict[str, Any]:
        """The next event of this name; others are skipped."""
        ends_s = time.monotonic() + timeout_s
        while True:
            line = self._line(ends_s - time.monotonic())
            if line["event"] == event:
                return line

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _line(self, timeout_s: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        ends_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            readable = wait_readable([self._process.stdout], max(ends_s - time.monotonic(), 0))
            assert readable, f"nothing came within {timeout_s:.1f} s"
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            assert piece, "the process has ended"
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found


@pytest.fixture
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


@pytest.fixture
def receiver(network: Network) -> Iterator[Process]:
    with Process(network, "a", "receiver") as process:
        yield process


@pytest.fixture
def writer(network: Network, receiver: Process) -> Iterator[Process]:
    with Process(network, "b", "writer", receiver.address) as process:
        yield process


def test_pages_are_right_over_a_slow_line_that_loses_packets(
    network: Network, writer: Process, receiver: Process
) -> None:
    network.limit("b", "100mbit")
    for side in ("a", "b"):
        network.drop(side, percent=2)
    writer.tell("reserve w:1 60")
    start_s = writer.wait("GrantReceived")["at_s"]
    writer.tell("finish w:1")
    arrived = receiver.wait("Arrived", timeout_s=40)
    writer.wait("Handed")
    assert arrived["is_right"]
    assert arrived["at_s"] - start_s > 0.2, "4 MiB came faster than the line is: there is no limit"


def test_a_cut_cable_is_noticed_and_the_pages_come_back(network: Network, writer: Process, receiver: Process) -> None:
    writer.tell("reserve w:1 60")
    writer.wait("GrantReceived")
    with Stopwatch() as watch:
        cut_s = time.monotonic()
        network.cut()
        failed = writer.wait("PushFailed")
        free = receiver.wait("BlocksFree")
    assert failed["reason"] == "silent"
    watch.assert_within(SILENCE_S, taken_s=failed["at_s"] - cut_s)
    assert free["is_right"]
    watch.assert_within(TCP_SILENCE_S + LATE_S, taken_s=free["at_s"] - cut_s)


def test_a_receiver_that_is_gone_without_a_word_is_noticed(
    network: Network, writer: Process, receiver: Process
) -> None:
    """Half open: its host drops all packets, and then it is dead."""
    writer.tell("reserve w:1 60")
    writer.wait("GrantReceived")
    network.drop("b", percent=100)
    with Stopwatch() as watch:
        gone_s = time.monotonic()
        receiver.kill()
        failed = writer.wait("PushFailed")
    assert failed["reason"] == "silent"
    watch.assert_within(SILENCE_S, taken_s=failed["at_s"] - gone_s)


def test_a_writer_that_is_gone_without_a_word_gives_its_pages_back(
    network: Network, writer: Process, receiver: Process
) -> None:
    writer.tell("reserve w:1 60")
    writer.wait("GrantReceived")
    network.drop("a", percent=100)
    with Stopwatch() as watch:
        gone_s = time.monotonic()
        writer.kill()
        free = receiver.wait("BlocksFree")
    assert free["is_right"]
    assert free["at_s"] - gone_s > 1.0
    watch.assert_within(TCP_SILENCE_S + LATE_S, taken_s=free["at_s"] - gone_s)


def test_a_close_is_noticed_at_once_by_either_end(network: Network, writer: Process, receiver: Process) -> None:
    writer.tell("reserve w:1 60")
    writer.wait("GrantReceived")
    with Process(network, "b", "writer", receiver.address) as other:
        with Stopwatch() as watch:
            killed_s = time.monotonic()
            writer.kill()
            free_s = receiver.wait("BlocksFree")["at_s"]
        watch.assert_within(CLOSE_S, taken_s=free_s - killed_s)
        other.tell("reserve w:2 60")
        other.wait("GrantReceived")
        with Stopwatch() as watch:
            killed_s = time.monotonic()
            receiver.kill()
            failed_s = other.wait("PushFailed")["at_s"]
        watch.assert_within(CLOSE_S, taken_s=failed_s - killed_s)


def test_a_stalled_transfer_fails_at_its_deadline(network: Network, writer: Process) -> None:
    """4 MiB over a line that takes minutes for it; the heartbeats of the receiver come through."""
    network.limit("b", "256kbit")
    with Stopwatch() as watch:
        asked_s = time.monotonic()
        writer.tell("reserve w:1 1.5")
        writer.wait("GrantReceived")
        failed = writer.wait("PushFailed")
    assert failed["reason"] == "deadline"
    assert failed["at_s"] - asked_s >= 1.5
    watch.assert_within(1.5 + LATE_S, taken_s=failed["at_s"] - asked_s)
