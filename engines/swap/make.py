"""The preemption of one engine, put together from its settings and its region."""

from __future__ import annotations

import logging

from torch import Tensor

from engines.swap.costs import SwapCosts
from engines.swap.host_store import HostStore
from engines.swap.ladder import Ladder
from engines.swap.relief import Relief
from engines.swap.swapped import SwappedRequests
from kvstore.blocks import BlockPool

logger = logging.getLogger(__name__)


def make_relief(kv: Tensor, pool: BlockPool, *, block_size: int, block_bytes: int, swap_bytes: int) -> Relief:
    """Measures a copy, so that the first decision has a figure to go by.

    Args:
        kv: the region, block-major.
        swap_bytes: of host memory; less than one block: nothing is swapped.
    """
    num_pages = swap_bytes // block_bytes
    if not num_pages:
        return Relief(Ladder(SwappedRequests(pool, block_size)))
    store = HostStore(kv, num_pages)
    copy_s = store.measure()
    logger.info("swap: %d pages, %.2f GB/s with checksum", num_pages, block_bytes / copy_s / 1e9)
    return Relief(Ladder(SwappedRequests(pool, block_size, BlockPool(num_pages)), SwapCosts(copy_s)), store)
