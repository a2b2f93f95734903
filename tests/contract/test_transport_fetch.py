"""FETCH: a hint to push a prefix; whoever gets it knows what is wanted and where it shall go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.transport import FetchDeclined, FetchRequested
from kvstore.transport.frames import FetchBody, FrameType, frame, parse_body, parse_header
from tests.contract.transport_helpers import End

KEYS = [bytes([n]) * 16 for n in range(3)]


@pytest.fixture(params=["shm", "tcp"])
def make_end(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], End]]:
    with contextlib.ExitStack() as stack:

        def make(name: str) -> End:
            end = End(name, str(tmp_path), [str(request.param)])
            stack.callback(end.close)
            return end

        yield make


def test_a_fetch_says_what_is_wanted_and_where_it_shall_go(make_end: Callable[[str], End]) -> None:
    asker, holder = make_end("asker"), make_end("holder")
    asker.node.fetch(holder.address, "fetch:1", KEYS, first=1)
    asker.node.fetch(holder.address, "fetch:2", KEYS[:1], first=0)
    wanted = [holder.wait(FetchRequested), holder.wait(FetchRequested)]
    assert [(w.xfer, w.keys, w.first) for w in wanted] == [("fetch:1", tuple(KEYS), 1), ("fetch:2", tuple(KEYS[:1]), 0)]
    assert wanted[0].address == asker.address
    holder.node.decline(wanted[1])
    assert asker.wait(FetchDeclined).xfer == "fetch:2"


def test_nobody_can_direct_pages_to_somebody_else(make_end: Callable[[str], End]) -> None:
    asker, holder, victim = make_end("asker"), make_end("holder"), make_end("victim")
    asker.node._address = victim.address
    asker.node.fetch(holder.address, "fetch:1", KEYS, first=0)
    assert not holder.sees(FetchRequested, within_s=0.5)
    assert holder.node.rejects() == {"state": 1}


def test_a_fetch_of_a_worker_that_is_gone_is_nothing(make_end: Callable[[str], End]) -> None:
    asker, holder = make_end("asker"), make_end("holder")
    holder.close()
    asker.node.fetch(holder.address, "fetch:1", KEYS, first=0)
    other = make_end("other")
    asker.node.fetch(other.address, "fetch:2", KEYS, first=0)
    assert other.wait(FetchRequested).xfer == "fetch:2"


def test_a_fetch_body_survives_the_wire(make_end: Callable[[str], End]) -> None:
    body = FetchBody("f", KEYS, 2, make_end("asker").address)
    raw = frame(FrameType.FETCH, body)
    kind, length = parse_header(raw[:12])
    assert parse_body(kind, raw[-length:], FetchBody) == body
