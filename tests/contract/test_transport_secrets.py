"""Secrets are rotated while nodes run: those with one in common meet in any order; others are refused by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore.transport import GrantReceived, GrantRefused, ReserveRequested
from tests.contract.transport_helpers import End

NEW, OLD, ANCIENT = b"the newest secret", b"the older secret", b"a secret of long ago"


class Accepted:
    """What a node accepts at the moment; a test changes it while the node runs."""

    def __init__(self, *secrets: bytes) -> None:
        self.secrets = secrets

    def __call__(self) -> tuple[bytes, ...]:
        return self.secrets


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[End, Accepted, End, Accepted]]:
    with contextlib.ExitStack() as stack:
        of_writer, of_reader = Accepted(OLD), Accepted(OLD)
        writer = End("writer", str(tmp_path), ["tcp"], secret=of_writer)
        stack.callback(writer.close)
        reader = End("reader", str(tmp_path), ["tcp"], secret=of_reader)
        stack.callback(reader.close)
        yield writer, of_writer, reader, of_reader


@pytest.mark.parametrize(
    ("of_writer", "of_reader"), [((OLD,), (OLD, NEW)), ((NEW, OLD), (OLD, NEW)), ((NEW, OLD), (NEW,))]
)
def test_two_nodes_meet_at_each_step_of_a_rotation(
    ends: tuple[End, Accepted, End, Accepted], of_writer: tuple[bytes, ...], of_reader: tuple[bytes, ...]
) -> None:
    writer, writer_accepts, reader, reader_accepts = ends
    writer_accepts.secrets, reader_accepts.secrets = of_writer, of_reader
    writer.reserve(reader.address, "w:1", 1)
    reader.node.grant(reader.wait(ReserveRequested), [0])
    assert writer.wait(GrantReceived).xfer == "w:1"


def test_lists_without_a_common_secret_are_refused_by_name_until_they_have_one(
    ends: tuple[End, Accepted, End, Accepted],
) -> None:
    writer, writer_accepts, reader, reader_accepts = ends
    writer_accepts.secrets, reader_accepts.secrets = (ANCIENT,), (NEW, OLD)
    writer.reserve(reader.address, "w:1", 1)
    assert writer.wait(GrantRefused).reason == "auth"
    assert reader.node.rejects() == {"auth": 1}
    writer_accepts.secrets = (NEW, ANCIENT)  # no restart
    for attempt in range(2, 20):
        writer.reserve(reader.address, f"w:{attempt}", 1)
        if reader.sees(ReserveRequested, within_s=0.2):
            return
    raise AssertionError("the nodes never met")
