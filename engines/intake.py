"""From an `Add` of the front to sequences; what no step could ever compute is refused here, by name."""

from __future__ import annotations

from collections.abc import Callable

from engines.messages import Add, Failed
from engines.request_check import fault_of
from engines.sequence import Sequence
from engines.swap.ladder import MAX_PREEMPTIONS


class Intake:
    """Owned by the engine thread.

    Args:
        max_model_len: tokens of a sequence, prompt and output.
        vocab_size: token ids of the model are below it.
        num_blocks: KV blocks of this worker.
    """

    def __init__(
        self, *, max_model_len: int, vocab_size: int, num_blocks: int, block_size: int, clock: Callable[[], float]
    ) -> None:
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._clock = clock

    def refusal(self, add: Add) -> Failed | None:
        """Why this worker can never compute it, or None."""
        fault = fault_of(add, vocab_size=self._vocab_size)
        if fault is not None:
            return Failed(add.rid, "invalid_value", fault)
        num_ids = len(add.prompt_ids) + max(map(len, add.choices))
        if num_ids >= self._max_model_len:
            text = f"{num_ids} tokens are more than the context of {self._max_model_len} holds"
            return Failed(add.rid, "context_length_exceeded", text)
        num_blocks = self.blocks_for(add, num_ids)
        if num_blocks > self._num_blocks:
            text = f"{num_blocks} KV blocks are needed, this worker has {self._num_blocks}"
            return Failed(add.rid, "context_length_exceeded", text)
        return None

    def sequence(self, add: Add, choice: int, output_ids: list[int]) -> Sequence:
        """One choice of it, with the tokens it has."""
        now = self._clock()
        return Sequence(
            rid=add.rid,
            choice=choice,
            prompt_token_ids=add.prompt_ids,
            params=add.params,
            seed=add.seed,
            output_token_ids=list(output_ids),
            arrival_s=now,
            deadline_s=now + add.deadline_s,
            priority=add.priority,
            tenant=add.tenant,
            epoch=add.epoch,
            # Released before, for lack of blocks: it gets all it can need and is not taken again.
            num_preemptions=MAX_PREEMPTIONS if add.reserve_full else 0,
            num_reserved_tokens=self._max_num_tokens(add) if add.reserve_full and add.mode == "local" else 0,
        )

    def add_of(self, sequence: Sequence, *, now_s: float) -> Add:
        """What another decode worker has to know of a sequence that moves there. The one pinned by this move gets all
        the blocks it can need."""
        assert sequence.owner is not None
        epoch, token = sequence.owner
        return Add(
            rid=sequence.rid,
            epoch=epoch,
            token=token,
            mode="push",
            prompt_ids=sequence.prompt_token_ids,
            choices=[sequence.output_token_ids],
            params=sequence.params,
            seed=sequence.seed,
            tenant=sequence.tenant,
            priority=sequence.priority,
            deadline_s=max(sequence.deadline_s - now_s, 0.0),
            reserve_full=sequence.num_preemptions >= MAX_PREEMPTIONS,
        )

    def blocks_for(self, add: Add, num_tokens: int) -> int:
        """Blocks to ask a decode worker for: what there is and one to grow into, or all it can ever need."""
        return -(-self.room_for(add, num_tokens) // self._block_size)

    def room_for(self, add: Add, num_tokens: int) -> int:
        """The same in tokens: a decode worker may have blocks of another size."""
        max_num_tokens = self._max_num_tokens(add)
        if add.reserve_full:
            return max_num_tokens
        return min((-(-num_tokens // self._block_size) + 1) * self._block_size, max_num_tokens)

    def _max_num_tokens(self, add: Add) -> int:
        return min(len(add.prompt_ids) + add.params.max_tokens, self._max_model_len)
