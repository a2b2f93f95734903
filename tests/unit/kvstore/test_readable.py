"""Waiting for descriptors beyond those that `select.select` can name."""

from __future__ import annotations

import os
import resource

import pytest

from kvstore.readable import wait_readable

HIGH = 1500


def test_a_descriptor_over_1023_can_be_waited_for() -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= HIGH:
        pytest.skip(f"this process may have no descriptor {HIGH}")
    reader, writer = os.pipe()
    high = os.dup2(reader, HIGH)
    assert wait_readable([high], 0.0) == []
    os.write(writer, b"x")
    assert wait_readable([high], 0.0) == [high]
    for fd in (reader, writer, high):
        os.close(fd)


def test_the_end_of_a_pipe_counts_as_readable() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    with os.fdopen(reader) as file:
        assert wait_readable([file]) == [file]


def test_a_closed_descriptor_is_an_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.close(writer)
    with pytest.raises(OSError, match="Bad file descriptor"):
        wait_readable([reader], 0.0)
