"""What can go wrong with blocks, as one tree.

BlockError(retryable)
├── OutOfBlocks    fewer free blocks than asked for; nothing changed                (retryable)
├── NotHeld        a block is shared or freed that nobody holds: a bug of the caller
└── GrantError     an answer to a reservation that the grant table does not wait for: a bug of the caller
"""

from __future__ import annotations


class BlockError(Exception):
    """Base of all errors of this package. `retryable`: the same call may succeed later, unchanged."""

    retryable: bool = False


class OutOfBlocks(BlockError):
    """Fewer blocks are free than are needed. The pool is unchanged."""

    retryable = True

    def __init__(self, *, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"{needed} KV blocks are needed, {free} of {total} are free. "
            "Wait until sequences end, preempt one, or give this worker more (`kv.memory_bytes`, `kv.num_blocks`)."
        )
        self.needed = needed
        self.free = free
        self.total = total


class NotHeld(BlockError):
    """A block id outside the pool, or one whose reference count is 0."""

    def __init__(self, *, block_id: int, verb: str) -> None:
        super().__init__(
            f"Block {block_id} cannot be {verb}: nobody holds it. Expected a block with a reference; "
            "look for a sequence that freed its block table twice."
        )
        self.block_id = block_id
        self.verb = verb


class GrantError(BlockError):
    """The caller broke the contract of `GrantTable`."""

    def __init__(self, *, xfer: str, why: str) -> None:
        super().__init__(f"Grant for transfer {xfer}: {why}. Answer each reservation once, with blocks of your own.")
        self.xfer = xfer
        self.why = why
