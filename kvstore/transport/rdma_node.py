"""What a node keeps for rdma: NIXL, the timer that looks after writes, and the peers that it did not work with."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from kvstore.transport.errors import RdmaError
from kvstore.transport.memory import PageMemory
from kvstore.transport.pacer import Pacer
from kvstore.transport.rdma import is_ended_by_us, load_nixl, nixl_version
from kvstore.transport.rdma_agent import RdmaAgent

logger = logging.getLogger(__name__)

MAX_PEERS: Final = 1024
MAX_FAILURES: Final = 2  # one may be the peer's death; then nobody asks for this incarnation again


class RdmaNode:
    """One per `KVNode`. After its making, owned by the `kv` thread.

    Attributes:
        version: of NIXL; a peer with another one is not talked to.
        is_proof: ending our side of a link proves that nothing more lands (see `is_ended_by_us`).
    """

    def __init__(self, incarnation: str, region: PageMemory) -> None:
        """Loads NIXL and makes a first agent, which takes UCX half a second and shows what is wrong.

        Raises:
            RdmaError: NIXL is not here, or cannot use this machine or this region.
        """
        self._nixl = load_nixl()
        self.version = nixl_version()
        self.is_proof = is_ended_by_us(region.kind)
        self._incarnation = incarnation
        self._region = region
        self._num_agents = 0
        self._failures: dict[str, int] = {}  # by the peer's incarnation
        self.pacer = Pacer()
        # One agent is always ready: to register a large region takes seconds, and the `kv` thread must not stop for it.
        self._maker = ThreadPoolExecutor(1, thread_name_prefix="rdma-spare")
        self._spare = self._maker.submit(self._make)
        self._spare.result()

    def take_agent(self) -> RdmaAgent:
        """For one link. Raises RdmaError."""
        taken, self._spare = self._spare, self._maker.submit(self._make)
        return taken.result()

    def _make(self) -> RdmaAgent:
        self._num_agents += 1
        return RdmaAgent(self._nixl, f"{self._incarnation}/{self._num_agents}", self._region)

    def misfit(self, target: str, version: str, *, can_be_avoided: bool) -> str:
        """Why rdma is no way to a peer with this version of NIXL; "" if it is one, or the only one."""
        if version != self.version:
            return f"this worker has {self.version}, the peer has {version or 'no NIXL, or does not allow rdma'}"
        has_failed = self._failures.get(target, 0) >= MAX_FAILURES
        return "it has failed with this peer" if has_failed and can_be_avoided else ""

    def failed(self, target: str, why: object, *, is_final: bool) -> None:
        """Writing to this peer failed, or can never work. From now on, or the next time, another way is taken."""
        before = self._failures.get(target, 0)
        self._failures[target] = MAX_FAILURES if is_final else before + 1
        if len(self._failures) > MAX_PEERS:  # incarnations come and go for ever
            self._failures.pop(next(iter(self._failures)))
        if before < MAX_FAILURES <= self._failures[target]:
            logger.warning("kv: no rdma to %s, tcp is used: %s", target, why)

    def close(self) -> None:
        """After all links."""
        self._maker.shutdown()
        with contextlib.suppress(RdmaError):
            self._spare.result().destroy()
        with contextlib.suppress(OSError):
            self.pacer.close()
