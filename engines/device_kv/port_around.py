"""A `KVPort` around another one: what it does not change goes through as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvstore.address import KVAddress
from kvstore.link_report import LinkReport
from kvstore.overdue import OverdueWriter
from kvstore.transport import Event, FetchRequested, KVPort


class PortAround:
    """What the ports of KV on a device share. Each method is as that of `KVNode`.

    Args:
        node: not started yet.
    """

    def __init__(self, node: KVPort) -> None:
        self._node = node

    @property
    def num_layers(self) -> int:
        return self._node.num_layers

    @property
    def wake_fd(self) -> int:
        return self._node.wake_fd

    def divert(self, takes: Callable[[Event], bool]) -> None:
        self._node.divert(takes)

    def reserve(
        self,
        target: KVAddress,
        xfer: str,
        *,
        rid: str,
        epoch: int,
        token: str,
        num_blocks: int,
        deadline_s: float,
        num_tokens: int = 0,
        group: str = "",
    ) -> None:
        self._node.reserve(
            target,
            xfer,
            rid=rid,
            epoch=epoch,
            token=token,
            num_blocks=num_blocks,
            deadline_s=deadline_s,
            num_tokens=num_tokens,
            group=group,
        )

    def fetch(self, holder: KVAddress, name: str, keys: Sequence[bytes], *, first: int) -> None:
        self._node.fetch(holder, name, keys, first=first)

    def decline(self, request: FetchRequested) -> None:
        self._node.decline(request)

    def grants(self) -> dict[str, int]:
        return self._node.grants()

    def overdue_writers(self) -> tuple[OverdueWriter, ...]:
        return self._node.overdue_writers()

    def counters(self) -> dict[str, float]:
        return self._node.counters()

    def links(self) -> tuple[LinkReport, ...]:
        return self._node.links()

    def rejects(self) -> dict[str, int]:
        return self._node.rejects()

    def check_invariants(self) -> None:
        self._node.check_invariants()
