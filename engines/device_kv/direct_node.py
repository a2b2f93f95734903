"""A KV node that serves the KV of an engine at its own addresses, and what it must not do before the device is ready.

    push, commit     not before what they send is computed
    grant            not before what was asked of these blocks is computed: the device may still read them
    Arrived          needs nothing: the pages are where they belong, and verified there

    engine thread ── jobs, each with a gate ──▶ one thread, which waits for the gates in turn ──▶ node

Gates are events of one stream, so none waits for more than it must. `abandon` and `settle` have none, but go the same
way, behind the jobs that they end: they wait for what was asked of the device before them, a step at most.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from engines.device_kv.gates import Gate, wait_for
from engines.device_kv.lane import Lane
from engines.device_kv.port_around import PortAround
from kvstore.address import KVAddress
from kvstore.transport import Event, KVPort, ReserveRequested, TransportError


class DirectNode(PortAround):
    """A `KVPort`. All methods are for the engine thread.

    Args:
        node: serves the engine's KV itself; not started yet. Some of it is called from the lane.
        gate: what the engine thread has asked the device to compute so far.
        make_lane: from a name and what is to be told of a failure.
    """

    def __init__(
        self,
        node: KVPort,
        *,
        gate: Callable[[], Gate],
        make_lane: Callable[[str, Callable[[Exception], None]], Lane],
    ) -> None:
        super().__init__(node)
        self._gate = gate
        self._lane = make_lane("kv-gates", self._failed)
        self._failure: Exception | None = None

    # ---------------------------------------------------------------- life
    def start(self) -> KVAddress:
        self._lane.start()
        return self._node.start()

    def stop(self) -> None:
        """The lane first: it wakes the engine over a descriptor that the node closes."""
        self._lane.stop()
        self._node.stop()

    # ---------------------------------------------------------------- writer
    def push(self, xfer: str, pairs: list[tuple[int, int]], layer_lo: int, layer_hi: int) -> None:
        """As `KVNode.push`, of what the engine thread has asked the device to compute so far."""
        taken = list(pairs)
        self._behind_gate(lambda: self._node.push(xfer, taken, layer_lo, layer_hi))

    def commit(self, xfer: str, *, src_blocks: list[int], num_tokens: int, state: bytes) -> None:
        taken = list(src_blocks)
        self._behind_gate(lambda: self._node.commit(xfer, src_blocks=taken, num_tokens=num_tokens, state=state))

    def abandon(self, xfer: str) -> None:
        self._lane.submit(lambda: self._node.abandon(xfer))

    # ---------------------------------------------------------------- receiver
    def grant(self, request: ReserveRequested, blocks: list[int] | None, reason: str = "") -> None:
        taken = None if blocks is None else list(blocks)
        self._behind_gate(lambda: self._node.grant(request, taken, reason))

    def settle(self, xfer: str, handed: bool) -> None:
        self._lane.submit(lambda: self._node.settle(xfer, handed))

    # ---------------------------------------------------------------- both
    def poll_events(self) -> list[Event]:
        """As `KVNode.poll_events`.

        Raises:
            TransportError: the `kv` thread or the device has failed; this engine must end.
        """
        events = self._node.poll_events()
        if self._failure is not None:
            raise TransportError("waiting for the device of the KV failed; restart this engine") from self._failure
        return events

    # ---------------------------------------------------------------- private
    def _behind_gate(self, action: Callable[[], None]) -> None:
        gate = self._gate()

        def job() -> None:
            wait_for(gate)
            action()

        self._lane.submit(job)

    def _failed(self, error: Exception) -> None:
        self._failure = error
        with contextlib.suppress(BlockingIOError, OSError, ValueError):  # ValueError: the node has closed it
            os.eventfd_write(self.wake_fd, 1)
