"""Paged attention against a naive reference, on random steps whose unused KV is NaN."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.attention.torch_backend import TorchAttention, _bucket

HEAD_DIM, NUM_LAYERS, NUM_BLOCKS = 16, 2, 96


class RandomStep:
    """Sequences with KV of their past in scattered blocks, and new tokens of this step."""

    def __init__(
        self, seed: int, *, num_kv_heads: int, queries_per_kv: int, block_size: int, decode_only: bool
    ) -> None:
        rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_heads = num_kv_heads * queries_per_kv
        self.kv = torch.full((NUM_BLOCKS, NUM_LAYERS, 2, num_kv_heads, block_size, HEAD_DIM), float("nan"))
        blocks = list(range(NUM_BLOCKS))
        rng.shuffle(blocks)
        self.rows: list[AttentionRow] = []
        self.histories: list[Tensor] = []  # [context, layer, 2, kv head, head_dim]
        slots: list[int] = []
        for _ in range(rng.randrange(1, 9)):
            num_new = 1 if decode_only or rng.random() < 0.5 else rng.randrange(2, 3 * block_size)
            start = rng.choice([0, rng.randrange(0, 5 * block_size), block_size])
            num_blocks = -(-(start + num_new) // block_size) + rng.randrange(2)  # maybe one to grow into
            row = AttentionRow(start, num_new, [blocks.pop() for _ in range(num_blocks)])
            history = torch.randn(row.context_len, NUM_LAYERS, 2, num_kv_heads, HEAD_DIM, generator=self.generator)
            for position in range(row.context_len):
                block, offset = row.block_table[position // block_size], position % block_size
                if position < start:
                    self.kv[block, :, :, :, offset] = history[position]
                else:
                    slots.append(block * block_size + offset)
            self.rows.append(row)
            self.histories.append(history)
        self.metadata = AttentionMetadata(tuple(self.rows), torch.tensor(slots))

    def new_kv(self, layer: int, which: int) -> Tensor:
        parts = [h[row.start :, layer, which] for row, h in zip(self.rows, self.histories, strict=True)]
        return torch.cat(parts)

    def naive(self, layer: int, q: Tensor) -> Tensor:
        """Softmax over every visible token, one query and one head at a time."""
        outputs, at = [], 0
        for row, history in zip(self.rows, self.histories, strict=True):
            for position in range(row.start, row.context_len):
                keys, values = history[: position + 1, layer, 0].double(), history[: position + 1, layer, 1].double()
                heads = []
                for head in range(self.num_heads):
                    kv_head = head * keys.shape[1] // self.num_heads
                    scores = keys[:, kv_head] @ q[at, head].double() / HEAD_DIM**0.5
                    heads.append(scores.softmax(0) @ values[:, kv_head])
                outputs.append(torch.stack(heads))
                at += 1
        return torch.stack(outputs).float()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(("num_kv_heads", "queries_per_kv"), [(1, 1), (2, 4), (3, 1)])
@pytest.mark.parametrize("decode_only", [False, True])
def test_any_mix_of_rows_equals_naive_attention(
    seed: int, num_kv_heads: int, queries_per_kv: int, decode_only: bool
) -> None:
    step = RandomStep(
        seed,
        num_kv_heads=num_kv_heads,
        queries_per_kv=queries_per_kv,
        block_size=[4, 8, 5][seed % 3],
        decode_only=decode_only,
    )
    attention = TorchAttention(step.kv)
    attention.begin_step(step.metadata)
    q = torch.randn(len(step.metadata.slot_mapping), step.num_heads, HEAD_DIM, generator=step.generator)

    for layer in range(NUM_LAYERS):
        attention.write_kv(layer, step.new_kv(layer, 0), step.new_kv(layer, 1))
        torch.testing.assert_close(attention.forward(layer, q), step.naive(layer, q), rtol=1e-4, atol=1e-5)


def test_writes_touch_only_their_own_slots() -> None:
    step = RandomStep(3, num_kv_heads=2, queries_per_kv=1, block_size=4, decode_only=False)
    before = step.kv.clone()
    attention = TorchAttention(step.kv)
    attention.begin_step(step.metadata)
    attention.write_kv(1, step.new_kv(1, 0), step.new_kv(1, 1))

    changed = (step.kv.nan_to_num(0) != before.nan_to_num(0)).any(dim=(2, 3, 5))  # [block, layer, offset]
    slots = changed.nonzero()
    assert not changed[:, 0].any()
    assert {int(block) * 4 + int(offset) for block, _, offset in slots} == set(step.metadata.slot_mapping.tolist())


def test_buckets_waste_at_most_half_and_are_few() -> None:
    for num_pages in range(1, 2000):
        assert num_pages <= _bucket(num_pages) < 2 * num_pages + 1
    assert len({_bucket(num_pages) for num_pages in range(1, 2000)}) <= 22
