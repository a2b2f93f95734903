"""Verified KV is told to the front at once, by the `kv` thread, and not when the step ends that runs meanwhile.

    step      ──── k ────────────────────┬──── k+1 ────    without: Arrived at the end of k, Promote read at that of k+1
    kv thread        verified ─ Arrived ─┼▶                with:    Promote read at the end of k, it joins step k+1
    front                        handoff ┴ Promote

The order that the front relies on holds: `Incoming` of a transfer is written before its grant is given, and nothing can
arrive before. An arrival is kept before the front hears of it, so its `Promote` always finds it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from engines.messages import EngineMessage
from kvstore import transport as kv

if TYPE_CHECKING:
    from engines.handoff_reader import HandoffReader


class EarlyArrivals:
    """`takes` is for `KVNode.divert`: called in the thread that works for the node, it never blocks.

    `post` tells the front, or leaves it to the engine's next turn and returns False; `wake_fd` brings that turn.
    """

    def __init__(self, reader: HandoffReader, post: Callable[[EngineMessage], bool], *, wake_fd: int) -> None:
        self._reader = reader
        self._post = post
        self._wake_fd = wake_fd

    def takes(self, event: kv.Event) -> bool:
        """Whether the front was told of it. Dry runs, prefixes and what cannot be read are the engine thread's."""
        if not isinstance(event, kv.Arrived) or not self._reader.expects(event.xfer):
            return False
        try:
            told = self._reader.keep(event)
        except msgspec.DecodeError:
            return False
        if not self._post(told):
            with contextlib.suppress(BlockingIOError):  # full: the engine is awake anyway
                os.eventfd_write(self._wake_fd, 1)
        return True
