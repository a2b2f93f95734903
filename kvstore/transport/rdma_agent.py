"""One NIXL agent: our region registered, at most one peer, writes that are posted and polled.

Each link has an agent of its own, at both ends, because the end of an agent is the only fence that UCX offers:

    destroyed at the receiver   its queue pair is gone, and the thread that would write for a tcp peer: nothing lands
    destroyed at the writer     nothing of ours is read any more, also if the peer has stopped or stalled; copies that a
                                GPU was asked for go on, so its memory is drained behind that (`PageMemory.drain`)

Cancelling a write, or deregistering memory, promises neither. Destroying takes 5 to 10 ms, also with writes under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final

from kvstore.transport.errors import RdmaError
from kvstore.transport.memory import MemoryKind, PageMemory

BACKEND: Final = "UCX"
MAX_DESCRIPTORS: Final = 1024  # per call; more of them fail in some versions, and stall the thread in all
MAX_METADATA_BYTES: Final = 64 << 10
# NIXL's own default makes its thread poll without a pause. With a delay it sleeps in poll(2) until a socket or a
# device has something; the delay is only the longest nap.
THREAD_NAP_US: Final = 50_000

Run = tuple[int, int, int]  # our address, the peer's address, bytes


class RdmaAgent:
    """For one thread, but NIXL's own. `metadata` is what a writer needs to reach the region."""

    def __init__(self, nixl: ModuleType, name: str, region: PageMemory) -> None:
        """Raises RdmaError: UCX finds no transport, or the region cannot be registered (locked memory, `ulimit -l`)."""
        self._nixl = nixl
        self._own = self._peer_kind = region.kind
        self._peer = ""
        self._posted: set[int] = set()
        config = nixl.nixlAgentConfig()
        config.useProgThread, config.useListenThread, config.pthrDelay = True, False, THREAD_NAP_US
        try:
            self._agent: Any = nixl.nixlAgent(name, config)
            self._backends = [self._agent.createBackend(BACKEND, {"ucx_error_handling_mode": "peer"})]
            own = [(region.address, region.num_bytes, region.kind.device, "")]
            memory = nixl.nixlRegDList(self._segment(region.kind), own)
            self._agent.registerMem(memory, self._backends)
            self.metadata = bytes(self._agent.getLocalMD())
        except Exception as error:  # NIXL's errors have no common base but this
            self._agent = None
            where = "" if region.kind.segment == "dram" else " of a GPU (`kv.direct: off` goes through host memory)"
            raise RdmaError(
                reason="no_rdma", detail=f"no agent over {region.num_bytes} bytes{where}: {error}"
            ) from error

    def connect(self, metadata: bytes, kind: MemoryKind) -> None:
        """Take in a receiver's `metadata`; its pages are memory of this `kind`. The first write makes the connection.

        Raises:
            RdmaError: it is not metadata, or no transport reaches that peer.
        """
        if not 0 < len(metadata) <= MAX_METADATA_BYTES:
            raise RdmaError(reason="no_rdma", detail=f"the peer's metadata has {len(metadata)} bytes")
        try:
            self._peer, self._peer_kind = self._agent.loadRemoteMD(metadata).decode(), kind
        except Exception as error:
            raise RdmaError(reason="no_rdma", detail=f"the peer cannot be reached: {error}") from error

    def post(self, runs: Sequence[Run]) -> int:
        """Begin to write at most `MAX_DESCRIPTORS` runs; returns a handle for `is_done`.

        Raises:
            RdmaError: the peer is gone, or its region does not hold these addresses.
        """
        assert len(runs) <= MAX_DESCRIPTORS
        nixl, agent, near, far = self._nixl, self._agent, self._own, self._peer_kind
        try:
            own = nixl.nixlXferDList(self._segment(near), [(src, size, near.device) for src, _, size in runs])
            peer = nixl.nixlXferDList(self._segment(far), [(dst, size, far.device) for _, dst, size in runs])
            handle = int(agent.createXferReq(nixl.NIXL_WRITE, own, peer, self._peer, "", self._backends))
            self._posted.add(handle)
            agent.postXferReq(handle)
        except Exception as error:
            raise RdmaError(reason="channel_lost: rdma", detail=str(error)) from error
        return handle

    def is_done(self, handle: int) -> bool:
        """True when all bytes of a `post` are in the peer's memory; the handle is over then.

        Raises:
            RdmaError: the peer is gone. What was written is not known.
        """
        try:
            if self._agent.getXferStatus(handle) == self._nixl.NIXL_IN_PROG:
                return False
            self._posted.discard(handle)
            self._agent.releaseXferReq(handle)
        except Exception as error:
            raise RdmaError(reason="channel_lost: rdma", detail=str(error)) from error
        return True

    def destroy(self) -> None:
        """After this nothing of ours is read, and nothing lands in our region through this agent. Callable twice."""
        agent, self._agent = self._agent, None
        if agent is None:
            return
        for handle in self._posted:
            try:
                agent.releaseXferReq(handle)
            except Exception:  # it failed already: releasing it can say no more
                continue
        self._posted.clear()
        del agent  # the only reference: NIXL joins its thread and closes its queue pairs here

    def _segment(self, kind: MemoryKind) -> object:
        """NIXL's name for a kind of memory."""
        return self._nixl.VRAM_SEG if kind.segment == "vram" else self._nixl.DRAM_SEG
