"""Host memory that a GPU copies to and from by itself: registered with CUDA, so that its pages never move."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from engines.errors import DeviceUnavailable

if TYPE_CHECKING:
    from kvstore.transport import KVRegion

logger = logging.getLogger(__name__)

REGISTER_DEFAULT = 0  # cudaHostRegisterDefault


def pin(region: KVRegion) -> None:
    """Register the mapping of `region` with CUDA, for the life of this process. Makes all of its pages.

    Raises:
        DeviceUnavailable: CUDA refuses; most often there is less memory that may be locked than the region has bytes.
    """
    cudart: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    code = int(cudart.cudaHostRegister(region.address, region.num_bytes, REGISTER_DEFAULT))
    if code:
        raise DeviceUnavailable(
            asked="cuda",
            why=f"cudaHostRegister of {region.num_bytes} bytes for moving KV failed with CUDA error {code}",
            hint="Lower `kv.bounce_bytes`, or raise the memory that may be locked (`ulimit -l`).",
        )
    logger.info("KV moves through %d MiB of pinned host memory", region.num_bytes >> 20)
