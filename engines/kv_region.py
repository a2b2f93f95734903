"""The KV memory of one engine as a tensor, and the shared region that the KV transport reads and writes as bytes.

    kv[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]      (2: keys, values)

Block-major, so a block is one contiguous run of bytes and so is a group of its layers; this is also the wire layout.

    on a CPU         kv is a view of the shared region: block i of one is block i of the other
    on a GPU, or     kv is memory of the engine alone; the shared region is a bounce region of fewer blocks of the same
    bounced          form, its slots, and `engines.device_kv` copies between the two
    direct           kv is memory of the engine alone, and rdma moves it by its addresses; there is no shared region
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engines.device_kv.pinned import pin
from engines.models.shape import ModelShape

if TYPE_CHECKING:
    from kvstore.transport import KVRegion, PageMemory


class KVTensor:
    """Owned by the engine thread. `kv` may be any tensor of the layout; `shared`: the region that peers see.

    Attributes:
        is_direct: rdma moves `kv` by its addresses.
    """

    def __init__(self, kv: Tensor, shared: KVRegion | None = None) -> None:
        self.kv = kv
        self.is_direct = False
        self._shared = shared

    @staticmethod
    def bytes_per_block(config: ModelShape, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of `block_size` tokens, keys and values of all layers."""
        return config.num_layers * 2 * config.kv_size * block_size * dtype.itemsize

    @classmethod
    def create(
        cls,
        config: ModelShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: str = "cpu",
        num_slots: int = 0,
        is_direct: bool = False,
    ) -> KVTensor:
        """Allocate the KV of an engine, zeroed, and a shared region (a memfd) if there is one.

        Args:
            device: where `kv` lies.
            num_slots: blocks of the shared region, if `kv` is memory apart from it. 0: `kv` is a view of it, which only
                a CPU can have.
            is_direct: no shared region.

        Raises:
            RegionError: there is not so much shared memory.
            DeviceUnavailable: the GPU does not take the bounce region as pinned memory.
        """
        from kvstore.transport import KVRegion  # here, so that models and attention run without the transports

        assert num_slots or is_direct or device == "cpu", f"KV on {device} needs a bounce region"
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        if is_direct:
            direct = cls(torch.zeros(shape, dtype=dtype, device=device))
            direct.is_direct = True
            return direct
        layer_bytes = cls.bytes_per_block(config, block_size, dtype) // config.num_layers
        shared = KVRegion.create(num_slots or num_blocks, config.num_layers, layer_bytes)
        if not num_slots:
            return cls.over(shared, config, block_size=block_size, dtype=dtype)
        if device != "cpu":
            pin(shared)
        return cls(torch.zeros(shape, dtype=dtype, device=device), shared)

    @classmethod
    def over(cls, shared: KVRegion, config: ModelShape, *, block_size: int, dtype: torch.dtype) -> KVTensor:
        """A region that is there already, of this process or of another, as a tensor."""
        shape = (shared.num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        return cls(torch.frombuffer(shared.buffer, dtype=dtype).view(shape), shared)

    @property
    def shared(self) -> KVRegion:
        assert self._shared is not None, "this KVTensor was made from a plain tensor"
        return self._shared

    @cached_property
    def served(self) -> PageMemory:
        """What a KV node moves: `shared`, or `kv` itself.

        Raises:
            RegionError: a layer of a block is too small to be moved by its addresses.
        """
        from engines.device_kv.device_region import DeviceRegion  # here, as above

        return DeviceRegion(self.kv) if self.is_direct else self.shared

    @property
    def is_apart(self) -> bool:
        """Block ids of `kv` are not those of a shared region: its bytes are not there to be read on the host."""
        return self.is_direct or (self._shared is not None and self.kv.data_ptr() != self._shared.address)

    @property
    def slots(self) -> Tensor:
        """The shared region as a tensor, on the host: `[shared.num_blocks, ...]`, else as `kv`."""
        shape = (self.shared.num_blocks, *self.kv.shape[1:])
        return torch.frombuffer(self.shared.buffer, dtype=self.kv.dtype).view(shape)

    @property
    def num_blocks(self) -> int:
        return self.kv.shape[0]

    @property
    def block_size(self) -> int:
        return self.kv.shape[4]

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, destination) each, all layers. No destination may be a source of this call."""
        if pairs:
            sources, destinations = zip(*pairs, strict=True)
            self.kv[list(destinations)] = self.kv[list(sources)]

    def zero_tail(self, block: int, from_offset: int) -> None:
        """Zero the tokens [from_offset, block_size) of a block, all layers."""
        self.kv[block, :, :, :, from_offset:] = 0
