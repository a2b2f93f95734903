"""Whether KV moves by its own addresses, and else how large a bounce region is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from engines.errors import BounceTooSmall

AUTOMATIC_CONTEXTS: Final = 4  # transfers of the largest size at the same time
AUTOMATIC_MAX_BYTES: Final = 2 << 30  # pinned memory is memory that nobody else gets


def choose_direct(setting: str, *, protocol: str, device: str, bounce_bytes: int) -> bool:
    """Whether rdma writes KV where it lies, on a GPU or in private memory of the host.

    Args:
        setting: `kv.direct`. auto: on a GPU, where rdma is the only protocol and nobody asks for a bounce region. on:
            also on a CPU; what does not go with it is refused with the settings (`configs/relations.py`).
    """
    if setting == "auto":
        return protocol == "rdma" and device != "cpu" and not bounce_bytes
    return setting == "on"


@dataclass(frozen=True, slots=True)
class BounceSize:
    """Blocks of the region, and of the largest transfer through it."""

    num_slots: int
    max_per_transfer: int

    @classmethod
    def choose(
        cls, bounce_bytes: int, *, device: str, block_bytes: int, block_size: int, max_model_len: int
    ) -> BounceSize | None:
        """None: the KV lies in the shared region itself.

        Args:
            bounce_bytes: the setting. 0: none on a CPU; on a GPU room for 4 transfers of `max_model_len` tokens, or
                what 2 GiB hold, but two of them at least: one in each direction.

        Raises:
            BounceTooSmall: there is not room for those two.
        """
        if not bounce_bytes and device == "cpu":
            return None
        max_per_transfer = -(-max_model_len // block_size) + 1  # a peer may count in blocks of another size
        least = 2 * max_per_transfer
        if not bounce_bytes:
            wanted = min(AUTOMATIC_CONTEXTS * max_per_transfer, AUTOMATIC_MAX_BYTES // block_bytes)
            return cls(max(wanted, least), max_per_transfer)
        num_slots = bounce_bytes // block_bytes
        if num_slots < least:
            raise BounceTooSmall(
                bounce_bytes=bounce_bytes, needed_bytes=least * block_bytes, max_model_len=max_model_len
            )
        return cls(num_slots, max_per_transfer)
