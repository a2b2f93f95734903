"""The gateway's gunicorn worker, as far as it needs no server."""

from __future__ import annotations

import logging
import sys

import pytest

from webapp.server import one_line_for_timeouts


def _record(error: Exception) -> logging.LogRecord:
    try:
        raise error
    except type(error):
        return logging.LogRecord("gunicorn.error", logging.ERROR, "", 0, "Socket error", (), sys.exc_info())


def test_a_client_that_does_not_read_is_told_in_one_line() -> None:
    record = _record(TimeoutError("timed out"))

    assert one_line_for_timeouts(record)
    assert record.exc_info is None
    assert "did not read" in record.getMessage()


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), ValueError("a defect")])
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    record = _record(error)

    assert one_line_for_timeouts(record)
    assert record.exc_info is not None
