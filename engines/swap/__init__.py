"""What becomes of a sequence when the KV blocks run out: host memory, another decode worker, or back to the queue.

    running --SWAP-->  pages of host memory  --blocks free again-->  running, not a token computed twice
            --MOVE-->  another decode worker, by the hand-off that prefill workers use
            --RELEASE--> the queue; its next grant is for all it can ever need

Owns the order of these three, the host store and its accounting. Must not know requests' texts, Redis or the front.
`host_store` holds tensors; nothing else here imports torch, so that the planner can use the schedulers.
"""

from engines.swap.costs import SwapCosts
from engines.swap.ladder import MAX_PREEMPTIONS, Ladder, Remedy
from engines.swap.swapped import BlockCopy, SwappedRequests

__all__ = ["MAX_PREEMPTIONS", "BlockCopy", "Ladder", "Remedy", "SwapCosts", "SwappedRequests"]
