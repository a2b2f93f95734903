"""KV of prefixes on its way between the caches of workers: written back by decode workers, fetched by prefill workers.

    decode worker  --full blocks, in the background-->  a prefill worker's cache      (the next turn, a checkpoint)
    prefill worker --FETCH-->  whoever keeps a prefix  --its blocks-->  the asker's cache

Both are the same push under the request id "prefix": granted from blocks that nobody needs, verified like any
hand-over, and findable by content from then on. No sequence waits for blocks here; what fails only makes it slower.
"""

from engines.prefix_share.sharing import NoSharing, PrefixSharing

__all__ = ["NoSharing", "PrefixSharing"]
