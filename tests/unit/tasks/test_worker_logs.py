"""Celery's log lines about the broker."""

from __future__ import annotations

import logging

import pytest
from celery.worker.consumer.consumer import CONNECTION_RETRY

from tasks import worker_logs


def test_a_lost_broker_is_one_line_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    worker_logs.install()
    worker_logs.install()
    logger = logging.getLogger(worker_logs.CONSUMER)

    try:
        raise ConnectionError("closed by server")
    except ConnectionError:
        logger.warning(CONNECTION_RETRY, exc_info=True)

    (record,) = caplog.records
    assert record.exc_info is None
    assert record.getMessage().count("ConnectionError: closed by server") == 1


def test_other_tracebacks_of_the_consumer_stay(caplog: pytest.LogCaptureFixture) -> None:
    worker_logs.install()

    try:
        raise ValueError("a defect")
    except ValueError:
        logging.getLogger(worker_logs.CONSUMER).warning("task lost", exc_info=True)

    assert caplog.records[0].exc_info is not None
