"""What a swap and a recomputation cost on this engine, learned from its own copies and steps. Pure."""

from __future__ import annotations

from typing import Final

SMOOTHING: Final = 0.2  # weight of the newest copy


class SwapCosts:
    """Seconds. Owned by the engine thread.

    Args:
        copy_s_per_block: of one copy of one block, its checksum included, as measured at the start.
    """

    def __init__(self, copy_s_per_block: float = 0.0) -> None:
        self.copy_s_per_block = copy_s_per_block
        self.compute_s_per_token: float | None = None

    def copied(self, num_blocks: int, elapsed_s: float) -> None:
        """So many blocks went one way."""
        if num_blocks:
            self.copy_s_per_block += SMOOTHING * (elapsed_s / num_blocks - self.copy_s_per_block)

    def stepped(self, num_tokens: int, elapsed_s: float) -> None:
        """A step ran. The cheapest step counts: the wider a step, the less each of its tokens costs, and a prompt that
        is computed again makes wide steps."""
        per_token_s = elapsed_s / num_tokens
        if self.compute_s_per_token is None or per_token_s < self.compute_s_per_token:
            self.compute_s_per_token = per_token_s

    def swap_s(self, num_blocks: int) -> float:
        """Out and back."""
        return 2 * num_blocks * self.copy_s_per_block

    def is_swap_cheaper(self, num_blocks: int, num_tokens: int) -> bool:
        """Than computing `num_tokens` again. True while nothing has been computed here: a copy is the safe guess."""
        return self.compute_s_per_token is None or self.swap_s(num_blocks) <= num_tokens * self.compute_s_per_token
