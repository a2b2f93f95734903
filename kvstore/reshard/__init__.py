"""Makes KV of one layout out of KV of another: block sizes, head slices, dtypes, compression on the wire.

Owns what a worker announces of its layout, the plan of which bytes become which, and the copies. Must not know sockets,
grants or engines: it sees layouts and buffers. `layout` and `plan` are pure; whoever copies imports `pack`, which needs
numpy.
"""

from kvstore.reshard.errors import Inconvertible
from kvstore.reshard.layout import DTYPE_BYTES, KVLayout
from kvstore.reshard.plan import Conversion, HeadShare, TokenPiece, head_share, share_runs, token_pieces

__all__ = [
    "DTYPE_BYTES",
    "Conversion",
    "HeadShare",
    "Inconvertible",
    "KVLayout",
    "TokenPiece",
    "head_share",
    "share_runs",
    "token_pieces",
]
