"""How a worker's KV lies in its region; what it announces at the handshake.

    region[num_blocks, num_layers, 2, head_hi - head_lo, block_size, head_dim]      (2: keys, values)

Every number is bounded when it is decoded, before anything is computed or allocated from it.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

Dtype = Literal["bfloat16", "float16", "float32"]
Compression = Literal["none", "fp8", "int8"]
DTYPE_BYTES: Final[dict[str, int]] = {"bfloat16": 2, "float16": 2, "float32": 4}
MAX_LAYER_BYTES: Final = 1 << 32  # of one block


class KVLayout(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One rank's KV. Fields are only ever added at the end.

    Attributes:
        num_kv_heads: of the model, over all ranks.
        head_lo, head_hi: this rank holds heads [head_lo, head_hi).
        block_size: tokens per block.
        compression: what this worker takes and sends on a network link; used where both sides ask for the same.

    Raises:
        ValueError: no such heads, or a block whose layers are larger than 4 GiB.
    """

    num_layers: Annotated[int, Meta(ge=1, le=1 << 12)]
    num_kv_heads: Annotated[int, Meta(ge=1, le=1 << 16)]
    head_lo: Annotated[int, Meta(ge=0, le=1 << 16)]
    head_hi: Annotated[int, Meta(ge=1, le=1 << 16)]
    block_size: Annotated[int, Meta(ge=1, le=1 << 16)]
    head_dim: Annotated[int, Meta(ge=1, le=1 << 16)]
    dtype: Dtype
    compression: Compression = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.head_lo < self.head_hi <= self.num_kv_heads:
            raise ValueError(f"heads [{self.head_lo}, {self.head_hi}) of {self.num_kv_heads}")
        if self.layer_bytes > MAX_LAYER_BYTES:
            raise ValueError(f"{self.layer_bytes} bytes per layer of a block, at most {MAX_LAYER_BYTES}")

    @property
    def num_heads(self) -> int:
        """Heads that this rank holds."""
        return self.head_hi - self.head_lo

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def head_bytes(self) -> int:
        """Keys, or values, of one head in one layer of a block: a contiguous run."""
        return self.block_size * self.head_dim * self.itemsize

    @property
    def layer_bytes(self) -> int:
        return 2 * self.num_heads * self.head_bytes
