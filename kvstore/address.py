"""Where a worker's KV region can be reached. Travels in the registry and in messages; holds no connection."""

from __future__ import annotations

import msgspec


class KVAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Listening places of one worker's KV node.

    Attributes:
        incarnation: the engine life that owns the region; another life is another address.
        host_id: equal on two workers only if they can share memory (boot id, uid and mount namespace).
        unix_path: control socket for `shm`, or "" where it is off.
        tcp_host, tcp_port: listener for `tcp`; port 0 where it is off.
        rdma_port, rdma_version: listener for the control frames of `rdma`, on `tcp_host`; what moves its pages.
        compat: hash over everything two workers must agree on (weights, dtype, layout, block size, tokenizer).
    """

    incarnation: str
    host_id: str
    unix_path: str = ""
    tcp_host: str = ""
    tcp_port: int = 0
    rdma_port: int = 0
    rdma_version: str = ""
    compat: str = ""
