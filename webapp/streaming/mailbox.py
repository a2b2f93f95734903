"""Where a serving thread waits for hints, and the one thread per process that delivers them."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Final, Protocol

from kvstore.errors import KVStoreError, StateUnavailable
from kvstore.state.entries import FeedItem

_log = logging.getLogger(__name__)

BLOCK_MS: Final = 500
RETRY_S: Final = 0.2
# A client that does not read: hints beyond this are dropped and the log is read instead.
MAX_HINTS: Final = 4096


class Mailbox:
    """Hints for one API call (one or several requests). Any thread may deliver; one thread waits."""

    def __init__(self) -> None:
        self._items: deque[FeedItem] = deque()
        self._changed = threading.Condition(threading.Lock())
        self._has_lost = False
        self.is_disconnected = False

    def deliver(self, items: list[FeedItem]) -> None:
        with self._changed:
            if len(self._items) + len(items) > MAX_HINTS:
                self._has_lost = True
            else:
                self._items.extend(items)
            self._changed.notify()

    def disconnect(self) -> None:
        """The client is gone."""
        with self._changed:
            self.is_disconnected = True
            self._changed.notify()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def wait(self, timeout_s: float) -> tuple[list[FeedItem], bool]:
        """What came, within `timeout_s`; the second value: hints were dropped, read the logs."""
        with self._changed:
            if not self._items and not self._has_lost and not self.is_disconnected:
                self._changed.wait(timeout_s)
            items, has_lost = list(self._items), self._has_lost
            self._items.clear()
            self._has_lost = False
        return items, has_lost


class Feed(Protocol):
    def read_feed(self, gateway: str, cursors: dict[int, str], block_ms: int) -> list[FeedItem]: ...


class FeedReader:
    """Thread `feed-reader`: follows this gateway's feed and wakes whoever waits for the request."""

    def __init__(self, store: Feed, gateway: str) -> None:
        self._store = store
        self._gateway = gateway
        self._boxes: dict[str, Mailbox] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed-reader", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=3.0)

    @property
    def num_open(self) -> int:
        return len(self._boxes)

    def subscribe(self, rid: str, box: Mailbox) -> None:
        with self._lock:
            self._boxes[rid] = box

    def unsubscribe(self, rid: str) -> None:
        with self._lock:
            self._boxes.pop(rid, None)

    def wake_all(self) -> None:
        with self._lock:
            boxes = list(self._boxes.values())
        for box in boxes:
            box.wake()

    def deliver(self, items: list[FeedItem]) -> None:
        """Sorts hints by request; those that nobody waits for are dropped."""
        by_rid: dict[str, list[FeedItem]] = {}
        for item in items:
            by_rid.setdefault(item.rid, []).append(item)
        with self._lock:
            boxes = [(self._boxes[rid], own) for rid, own in by_rid.items() if rid in self._boxes]
        for box, own in boxes:
            box.deliver(own)

    def _run(self) -> None:
        cursors: dict[int, str] = {}
        while not self._stopped.is_set():
            try:
                self.deliver(self._store.read_feed(self._gateway, cursors, BLOCK_MS))
            except StateUnavailable:
                self._stopped.wait(RETRY_S)
            except KVStoreError as error:
                _log.warning("the feed cannot be read, trying again: %s", error)
                self._stopped.wait(RETRY_S)
            except Exception:
                _log.exception("the feed cannot be read, trying again")
                self._stopped.wait(RETRY_S)
