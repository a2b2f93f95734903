"""Celery's own log lines as we want them: a lost broker connection is one line, not the traceback of a defect."""

from __future__ import annotations

import logging
import warnings

from celery.exceptions import CPendingDeprecationWarning

CONSUMER = "celery.worker.consumer.consumer"


class BrokerLossFilter(logging.Filter):
    """Turns the traceback of a lost connection into its last line. Other records pass as they are."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and "Connection to broker lost" in str(record.msg):
            error = record.exc_info[1]
            record.msg = f"{str(record.msg).strip()} ({type(error).__name__}: {error})"
            record.exc_info = None
        return True


def install() -> None:
    """In a worker, before it connects. A second call adds nothing."""
    logger = logging.getLogger(CONSUMER)
    if not any(isinstance(one, BrokerLossFilter) for one in logger.filters):
        logger.addFilter(BrokerLossFilter())
    # At each reconnect Celery announces that it keeps running tasks: that is what we chose (tasks.conf).
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning, module=CONSUMER)
