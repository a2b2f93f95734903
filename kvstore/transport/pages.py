"""Where the pages of a peer go in our region, and which bytes of a block are the peer's. Chosen once per link.

the same layout    whole blocks
a head slice       the runs of the heads that the peer holds; it cannot name any other byte
compressed         a buffer first; expanded into the pages when it is full
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from kvstore.reshard.plan import Conversion, share_runs
from kvstore.transport.errors import BadFrame
from kvstore.transport.memory import PageMemory
from kvstore.transport.region import KVRegion

MAX_PACKED_BYTES = 64 << 20  # of a frame that is expanded; ours are of 1 MiB, or one layer group of one block


class PeerPages(Protocol):
    layer_bytes: int  # on the wire, per layer of a block

    def views(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> list[memoryview]:
        """Where the bytes of one DATA frame go. Raises BadFrame: more than is taken at once."""
        ...

    def landed(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> None:
        """They are all there."""
        ...

    def held(self, block: int) -> Iterator[list[memoryview]]:
        """What this peer writes of a block: the runs of each layer."""
        ...


class WholePages:
    def __init__(self, region: KVRegion) -> None:
        self.layer_bytes = region.layer_bytes
        self._region = region

    def views(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> list[memoryview]:
        return [self._region.run(block, layer_lo, layer_hi) for block in blocks]

    def landed(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> None:
        pass

    def held(self, block: int) -> Iterator[list[memoryview]]:
        for layer in range(self._region.num_layers):
            yield [self._region.run(block, layer, layer + 1)]


class SharePages:
    """The heads that the peer holds, in our layout."""

    def __init__(self, region: KVRegion, conversion: Conversion) -> None:
        self.layer_bytes = conversion.share_layer_bytes
        self._region = region
        self._conversion = conversion

    def views(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> list[memoryview]:
        return [view for block in blocks for view in self._runs(block, layer_lo, layer_hi)]

    def landed(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> None:
        pass

    def held(self, block: int) -> Iterator[list[memoryview]]:
        for layer in range(self._region.num_layers):
            yield list(self._runs(block, layer, layer + 1))

    def _runs(self, block: int, layer_lo: int, layer_hi: int) -> Iterator[memoryview]:
        page = self._region.block(block)
        for offset, num_bytes in share_runs(self._conversion.destination, self._conversion.share, layer_lo, layer_hi):
            yield page[offset : offset + num_bytes]


class PackedPages(SharePages):
    """Frames come compressed. One buffer per link: frames of a connection come one after the other."""

    def __init__(self, region: KVRegion, conversion: Conversion) -> None:
        from kvstore.reshard.pack import Unpacker  # numpy: only where somebody asks for compression

        super().__init__(region, conversion)
        self.layer_bytes = conversion.wire_layer_bytes
        self._unpacker = Unpacker(conversion, region.buffer)
        self._buffer = bytearray()

    def views(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> list[memoryview]:
        num_bytes = len(blocks) * (layer_hi - layer_lo) * self.layer_bytes
        if num_bytes > MAX_PACKED_BYTES:
            raise BadFrame(reason="length", detail=f"{num_bytes} compressed bytes, at most {MAX_PACKED_BYTES}")
        if len(self._buffer) < num_bytes:
            self._buffer = bytearray(num_bytes)
        return [memoryview(self._buffer)[:num_bytes]]

    def landed(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> None:
        part_bytes = (layer_hi - layer_lo) * self.layer_bytes
        for k, block in enumerate(blocks):
            packed = memoryview(self._buffer)[k * part_bytes : (k + 1) * part_bytes]
            self._unpacker.expand(packed, block, layer_lo, layer_hi)


class FarPages:
    """Of memory that this process only knows by its addresses: peers write it by themselves, over rdma."""

    def __init__(self, memory: PageMemory) -> None:
        self.layer_bytes = memory.layer_bytes

    def views(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> list[memoryview]:
        raise BadFrame(reason="state", detail=f"DATA for layers {layer_lo}..{layer_hi} of {len(blocks)} blocks by rdma")

    def landed(self, blocks: Sequence[int], layer_lo: int, layer_hi: int) -> None:
        pass

    def held(self, block: int) -> Iterator[list[memoryview]]:  # noqa: ARG002  (a peer holds all of it)
        return iter(())


def pages_of(region: PageMemory, conversion: Conversion | None) -> PeerPages:
    """For a link that converts so; None: both ends only know the size of a layer, and it is the same."""
    if not isinstance(region, KVRegion):
        return FarPages(region)
    if conversion is None:
        return WholePages(region)
    if conversion.is_compressed:
        return PackedPages(region, conversion)
    return WholePages(region) if conversion.is_whole else SharePages(region, conversion)
