"""Where the pages of a node lie, as far as it must know: sizes, an address, the kind of memory, who hashes them.

KVRegion           shared memory of the host: every protocol, and its bytes are there for whoever asks
any other one      such as memory of a GPU: rdma only, which moves addresses and never looks at a byte itself
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol

from kvstore.native.pages import PageHashes, Pages

MAX_DEVICES: Final = 1024


@dataclass(frozen=True, slots=True)
class MemoryKind:
    """What NIXL must know of memory beside its address. `device`: of a GPU, as its own process counts them."""

    segment: Literal["dram", "vram"] = "dram"
    device: int = 0


HOST: Final = MemoryKind()


class PageMemory(Protocol):
    """Blocks one after the other from `address` on, each of `num_layers` cells of `layer_bytes`.

    Attributes:
        address: of the first byte: one of the host, or of the device, according to `kind`.
        pages: the same with the sizes, for `ops`.
    """

    @property
    def num_blocks(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def layer_bytes(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def pages(self) -> Pages: ...
    @property
    def kind(self) -> MemoryKind: ...
    @property
    def ops(self) -> PageHashes: ...

    def drain(self) -> None:
        """Return when nothing that this process has begun still copies from these pages.

        For the end of a link: a destroyed agent begins nothing more, but what it had asked a GPU to copy goes on.
        """
        ...
