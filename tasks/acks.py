"""Acknowledging and keeping Celery messages, many at a time, straight on kombu's Redis keys. Hub thread only."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from kombu.transport.virtual import QoS

log = logging.getLogger(__name__)


class BatchedAcks:
    """Acks of one hub turn go out in one pipeline: about a quarter of the cost of a task otherwise."""

    def __init__(self) -> None:
        self._messages: list[Any] = []

    def add(self, message: Any) -> None:
        self._messages.append(message)

    def flush(self) -> None:
        """One that fails is delivered again after the visibility timeout, and then only acked."""
        messages, self._messages = self._messages, []
        by_channel: dict[Any, list[Any]] = defaultdict(list)
        for message in messages:
            by_channel[message.channel].append(message)
        for channel, group in by_channel.items():
            tags = [message.delivery_tag for message in group]
            try:
                with channel.conn_or_acquire() as client, client.pipeline() as pipe:
                    pipe.zrem(channel.unacked_index_key, *tags).hdel(channel.unacked_key, *tags).execute()
            except Exception as error:
                log.warning("%d acks failed, the messages will come again: %s", len(tags), error)
                continue
            for message in group:
                QoS.ack(channel.qos, message.delivery_tag)  # type: ignore[no-untyped-call]  # the base class's: only the local book-keeping
                message._state = "ACK"


def renew_unacked(channel: Any, messages: Iterable[Any]) -> None:
    """A lease: what we hold stays invisible to others. kombu itself would give it back after the visibility timeout."""
    tags = [message.delivery_tag for message in messages]
    if not tags:
        return
    try:
        with channel.conn_or_acquire() as client:
            client.zadd(channel.unacked_index_key, dict.fromkeys(tags, time.time()), xx=True)
    except Exception as error:
        log.warning("the broker lease of %d messages was not renewed: %s", len(tags), error)
