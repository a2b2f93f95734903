"""Moves KV blocks between workers: listeners, handshakes, and transfers over shared memory or tcp, all in `KVNode`.

Owns bytes in a `KVRegion`, the wire format, and the states of transfers at both ends. Must not know tensors, models,
schedulers or Redis: blocks are ids, a request is an opaque id with an epoch and a token.
"""

from kvstore.overdue import OverdueWriter
from kvstore.transport.errors import BadFrame, HandshakeRefused, RegionError, TlsFilesError, TransportError
from kvstore.transport.events import (
    Arrived,
    BlocksFree,
    Event,
    FetchDeclined,
    FetchRequested,
    GrantReceived,
    GrantRefused,
    Handed,
    PushFailed,
    Refused,
    ReserveRequested,
    SourceFree,
)
from kvstore.transport.frames import FETCH_PREFIX
from kvstore.transport.memory import MemoryKind, PageMemory
from kvstore.transport.node import KVNode
from kvstore.transport.port import KVPort
from kvstore.transport.region import KVRegion
from kvstore.transport.settings import Times
from kvstore.transport.tls import TlsFiles
from kvstore.transport.touch import start_touching

__all__ = [
    "FETCH_PREFIX",
    "Arrived",
    "BadFrame",
    "BlocksFree",
    "Event",
    "FetchDeclined",
    "FetchRequested",
    "GrantReceived",
    "GrantRefused",
    "Handed",
    "HandshakeRefused",
    "KVNode",
    "KVPort",
    "KVRegion",
    "MemoryKind",
    "OverdueWriter",
    "PageMemory",
    "PushFailed",
    "Refused",
    "RegionError",
    "ReserveRequested",
    "SourceFree",
    "Times",
    "TlsFiles",
    "TlsFilesError",
    "TransportError",
    "start_touching",
]
