"""Tiers behind the prefix cache: blocks that the region evicts go on living in host memory and on disk.

    region --evicted--> host memory --written behind--> disk        found again by the same chained content hash
           <--restored--            <--prefetched------

Owns bytes by content hash and their checksums. Must not know sequences, tokens or tensors. A block that fails its
checksum is as good as one that was never kept: it is computed again.
"""

from kvstore.tiers.disk_tier import DiskTier
from kvstore.tiers.errors import TierError
from kvstore.tiers.host_tier import HostTier
from kvstore.tiers.tiered_store import TieredStore, TierStats

__all__ = ["DiskTier", "HostTier", "TierError", "TierStats", "TieredStore"]
