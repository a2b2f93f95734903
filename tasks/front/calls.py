"""Calls on the state server that are repeated until it answers. Output thread only.

turn      messages of the engine ── gather, gather, gather ──▶ run: one call for the three, one round trip
meanwhile more messages come     ── they go with the next turn's call; nobody waits for company
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, Generic, TypeVar

from kvstore.clock import Clock
from kvstore.errors import KVStoreError, StateUnavailable

log = logging.getLogger(__name__)

ItemT = TypeVar("ItemT")
ReplyT = TypeVar("ReplyT")
RETRY_FIRST_S: Final = 0.05
RETRY_MAX_S: Final = 0.5
MAX_TOGETHER: Final = 64  # claims bring whole prompts: more would strain the call's timeout


@dataclass(frozen=True, eq=False)
class CallGroup(Generic[ItemT, ReplyT]):
    """Calls of one kind, which may share a round trip.

    Attributes:
        call_each: calls for several items; one reply per item, in order, or what is wrong with that item alone.
        replying: entered while the replies of one round trip are handled.
    """

    call_each: Callable[[Sequence[ItemT]], Sequence[ReplyT | KVStoreError]]
    replying: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class _Call:
    what: str
    group: CallGroup[Any, Any]
    item: Any
    on_reply: Callable[[Any], None]
    on_error: Callable[[KVStoreError], None] | None


class RepeatedCalls:
    """Calls on the state server, in order, each until it is answered.

    Every function there is safe to repeat with the same arguments, so no reply is no problem: the calls stay at the
    head of the queue and go out again. Nobody blocks meanwhile: while the server is away, nothing is tried but the
    head, with back-off.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue: deque[_Call] = deque()
        self._retry_s = 0.0  # current back-off
        self._retry_at_s = 0.0
        self._is_running = False

    def __len__(self) -> int:
        return len(self._queue)

    def do(
        self,
        what: str,
        call: Callable[[], ReplyT],
        on_reply: Callable[[ReplyT], None],
        on_error: Callable[[KVStoreError], None] | None = None,
    ) -> None:
        """Call now, or in turn. `on_error`: the server answered, with something that repeating cannot mend."""
        alone: CallGroup[None, ReplyT] = CallGroup(lambda _: [call()])
        self.gather(what, alone, None, on_reply, on_error)
        self.run()

    def gather(
        self,
        what: str,
        group: CallGroup[ItemT, ReplyT],
        item: ItemT,
        on_reply: Callable[[ReplyT], None],
        on_error: Callable[[KVStoreError], None] | None = None,
    ) -> None:
        """Call at the next `run`, in turn: together with its neighbours of the same group.

        Two of the same `what` never go together: the reply of the first is handled before the second is sent.
        """
        self._queue.append(_Call(what, group, item, on_reply, on_error))

    def next_s(self) -> float | None:
        return self._retry_at_s if self._queue else None

    def run(self) -> None:
        """Work off what is due. Replies may queue further calls."""
        if self._is_running:
            return
        self._is_running = True
        try:
            while self._queue and self._clock() >= self._retry_at_s:
                if not self._try(self._first_together()):
                    return
        finally:
            self._is_running = False

    def _first_together(self) -> list[_Call]:
        """The head of the queue and what may go out with it."""
        together: list[_Call] = []
        seen: set[str] = set()
        for call in islice(self._queue, MAX_TOGETHER):
            if call.group is not self._queue[0].group or call.what in seen:
                break
            together.append(call)
            seen.add(call.what)
        return together

    def _try(self, together: list[_Call]) -> bool:
        group = together[0].group
        replies: Sequence[Any]
        try:
            replies = group.call_each([call.item for call in together])
        except StateUnavailable:
            self._retry_s = min(max(2 * self._retry_s, RETRY_FIRST_S), RETRY_MAX_S)
            self._retry_at_s = self._clock() + self._retry_s
            return False
        except KVStoreError as error:
            replies = [error] * len(together)
        else:
            self._retry_s = self._retry_at_s = 0.0
        for _ in together:
            self._queue.popleft()
        with group.replying():
            for call, reply in zip(together, replies, strict=True):
                _answer(call, reply)
        return True


def _answer(call: _Call, reply: Any) -> None:
    try:
        if not isinstance(reply, KVStoreError):
            call.on_reply(reply)
            return
        log.error("%s failed: %s", call.what, reply)
        if call.on_error is not None:
            call.on_error(reply)
    except Exception:  # the other replies of the same round trip are still to be handled
        log.exception("handling the reply of %s failed", call.what)
