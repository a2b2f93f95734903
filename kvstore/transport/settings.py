"""What both sides of a node share: who we are, our memory, our times."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvstore.clock import Clock
from kvstore.reshard.layout import KVLayout
from kvstore.transport.estimator import LinkEstimates
from kvstore.transport.events import Event
from kvstore.transport.memory import PageMemory
from kvstore.transport.rdma_node import RdmaNode
from kvstore.transport.region import KVRegion
from kvstore.transport.tls import Tls

logger = logging.getLogger(__name__)

LOG_EVERY_S = 60.0


@dataclass(frozen=True)
class Times:
    """Seconds. Tests shorten them; two nodes that talk should agree on them."""

    heartbeat_s: float = 0.5
    silence_s: float = 1.8  # the writer closes a link that is silent so long; the receiver fences what is open on it
    frame_grace_s: float = 5.0  # a frame, once begun, is through after this and its length at `min_bytes_per_s`
    min_bytes_per_s: float = 64 << 10
    tcp_silence_s: float = 10.0  # the receiver closes a silent tcp connection: nothing can land after that
    handshake_s: float = 5.0
    reserve_s: float = 3.0  # for the grant, connecting included
    commit_every_s: float = 0.5
    commit_s: float = 3.0
    renew_s: float = 1.0
    grant_lease_s: float = 5.0  # the receiver takes back a grant that nobody has renewed for so long
    fence_kill_s: float = 3.0  # a writer that leaves FENCE unanswered so long is overdue
    engine_s: float = 5.0  # an engine thread that does not look at its events so long does not renew its grants
    backoff_min_s: float = 0.1
    backoff_max_s: float = 2.0

    @classmethod
    def with_leases(cls, *, grant_lease_s: float, fence_kill_s: float) -> Times:
        """The usual times around these two. A short lease is renewed more often: two renewals may be lost."""
        return cls(renew_s=min(1.0, grant_lease_s / 3), grant_lease_s=grant_lease_s, fence_kill_s=fence_kill_s)


@dataclass(eq=False)
class NodeContext:
    """One per `KVNode`. `counters` and `rejects` are written by the `kv` thread only."""

    incarnation: str
    region: PageMemory
    secrets: Callable[[], Sequence[bytes]]  # all that are accepted, the current one first; asked at each handshake
    compat: str
    protocols: tuple[str, ...]
    checksum: bool
    clock: Clock
    emit: Callable[[Event], None]
    times: Times = field(default_factory=Times)
    layout: KVLayout | None = None
    host_id: str = ""
    tls: Tls | None = None  # under all connections but those of this host
    rdma: RdmaNode | None = None  # where `protocols` has it
    links: LinkEstimates = field(default_factory=lambda: LinkEstimates(own_host_id=""))
    counters: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    _logged_s: dict[str, float] = field(default_factory=dict)

    @property
    def shared(self) -> KVRegion:
        """The region of a node that also speaks shm or tcp."""
        assert isinstance(self.region, KVRegion), "a node over other memory has rdma only"
        return self.region

    def reject(self, reason: str, detail: object, *, peer: str = "") -> None:
        """Count a refusal; log it at most once a minute per reason."""
        self.rejects[reason] += 1
        now = self.clock()
        if now - self._logged_s.get(reason, -LOG_EVERY_S) >= LOG_EVERY_S:
            self._logged_s[reason] = now
            logger.warning("kv: refused %s (%s): %s", peer or "a peer", reason, detail)


def host_id() -> str:
    """Equal on two processes only if they can share memory: same boot, user and mount namespace."""
    parts = [
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        str(os.getuid()),
        str(Path("/proc/self/ns/mnt").readlink()),
    ]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]
