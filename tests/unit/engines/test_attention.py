"""Each paged attention against a naive reference, on random steps whose unused KV is NaN."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engines.attention.backend import AttentionBackend, AttentionMetadata, AttentionRow
from engines.attention.flashinfer_backend import FlashInferAttention
from engines.attention.native_backend import SPLIT_TOKENS, NativeAttention
from engines.attention.torch_backend import TorchAttention, _bucket
from engines.ext.library import load_kernels
from tests import reference_flashinfer
from tests.devices import needs_gpu

HEAD_DIM, NUM_LAYERS, NUM_BLOCKS = 32, 2, 96
BACKENDS = ["torch", "native", "flashinfer", pytest.param("cuda", marks=needs_gpu)]


def make_attention(backend: str, step: RandomStep) -> AttentionBackend:
    if backend == "torch":
        return TorchAttention(step.kv)
    if backend == "flashinfer":  # its calls, with plain torch behind them
        return FlashInferAttention(step.kv, step.num_heads, reference_flashinfer)
    if backend == "cuda":
        return _OnGpu(step.kv)
    return NativeAttention(step.kv, step.num_heads, load_kernels(step.kv.dtype))


class _OnGpu:
    """Torch's attention on a GPU over a copy of `kv`, which is brought back after each layer's writes."""

    def __init__(self, kv: Tensor) -> None:
        self._kv, self._there = kv, kv.cuda()
        self._inner = TorchAttention(self._there)

    def begin_step(self, metadata: AttentionMetadata) -> None:
        self._inner.begin_step(AttentionMetadata(metadata.rows, metadata.slot_mapping.cuda()))

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        self._inner.write_kv(layer, k.cuda(), v.cuda())
        self._kv.copy_(self._there)

    def forward(self, layer: int, q: Tensor) -> Tensor:
        return self._inner.forward(layer, q.cuda()).cpu()


class RandomStep:
    """Sequences with KV of their past in scattered blocks, and new tokens of this step."""

    def __init__(
        self,
        seed: int,
        *,
        num_kv_heads: int,
        queries_per_kv: int,
        block_size: int,
        decode_only: bool,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_heads = num_kv_heads * queries_per_kv
        self.kv = torch.full((NUM_BLOCKS, NUM_LAYERS, 2, num_kv_heads, block_size, HEAD_DIM), float("nan")).to(dtype)
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
            history = history.to(dtype)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("num_kv_heads", "queries_per_kv"), [(1, 1), (2, 4), (3, 1), (1, 7)])
@pytest.mark.parametrize("decode_only", [False, True])
def test_any_mix_of_rows_equals_naive_attention(
    seed: int, num_kv_heads: int, queries_per_kv: int, decode_only: bool, dtype: torch.dtype, backend: str
) -> None:
    step = RandomStep(
        seed,
        num_kv_heads=num_kv_heads,
        queries_per_kv=queries_per_kv,
        block_size=[4, 8, 5][seed % 3],
        decode_only=decode_only,
        dtype=dtype,
    )
    attention = make_attention(backend, step)
    attention.begin_step(step.metadata)
    q = torch.randn(len(step.metadata.slot_mapping), step.num_heads, HEAD_DIM, generator=step.generator).to(dtype)
    tolerance = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 2e-2)

    for layer in range(NUM_LAYERS):
        attention.write_kv(layer, step.new_kv(layer, 0), step.new_kv(layer, 1))
        found, expected = attention.forward(layer, q).float(), step.naive(layer, q)
        torch.testing.assert_close(found, expected, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_touch_only_their_own_slots(backend: str) -> None:
    step = RandomStep(3, num_kv_heads=2, queries_per_kv=1, block_size=4, decode_only=False)
    before = step.kv.clone()
    attention = make_attention(backend, step)
    attention.begin_step(step.metadata)
    attention.write_kv(1, step.new_kv(1, 0), step.new_kv(1, 1))

    changed = (step.kv.nan_to_num(0) != before.nan_to_num(0)).any(dim=(2, 3, 5))  # [block, layer, offset]
    slots = changed.nonzero()
    assert not changed[:, 0].any()
    assert {int(block) * 4 + int(offset) for block, _, offset in slots} == set(step.metadata.slot_mapping.tolist())


class LongSequence:
    """One sequence over several splits and tiles, whose KV is written before."""

    def __init__(
        self, *, num_tokens: int, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, num_heads: int = 9
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        num_blocks = -(-num_tokens // 32)
        self.kv = torch.randn(num_blocks + 4, 1, 2, 3, 32, head_dim, generator=generator).to(dtype)
        self.q = torch.randn(num_tokens, num_heads, head_dim, generator=generator).to(dtype)
        self.table = list(range(num_blocks))[::-1]
        self.attention = NativeAttention(self.kv, num_heads, load_kernels(dtype))

    def attend(self, *spans: tuple[int, int]) -> list[Tensor]:
        """Outputs of the queries at [lo, hi) of each span, all spans as rows of one step."""
        rows = tuple(AttentionRow(lo, hi - lo, self.table) for lo, hi in spans)
        num_tokens = sum(hi - lo for lo, hi in spans)
        self.attention.begin_step(AttentionMetadata(rows, torch.zeros(num_tokens, dtype=torch.int64)))
        out = self.attention.forward(0, torch.cat([self.q[lo:hi] for lo, hi in spans]))
        return list(out.split([hi - lo for lo, hi in spans]))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_contexts_agree_between_decode_prefill_and_sdpa(dtype: torch.dtype, head_dim: int) -> None:
    length = 2 * SPLIT_TOKENS + 77
    sequence = LongSequence(num_tokens=length, head_dim=head_dim, dtype=dtype)
    decoded, prefilled = sequence.attend((length - 1, length), (length - 40, length))
    keys, values = (
        sequence.kv[sequence.table, 0, which].transpose(0, 1).reshape(3, -1, head_dim)[:, :length].float()
        for which in (0, 1)
    )
    q = sequence.q[-1].view(3, 3, head_dim).float()
    expected = torch.softmax(q @ keys.transpose(1, 2) / head_dim**0.5, -1) @ values
    tolerance = 2e-5 if dtype == torch.float32 else 1e-2

    torch.testing.assert_close(decoded[0].float(), expected.view(9, head_dim), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(prefilled[-1].float(), expected.view(9, head_dim), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [16, 32, 64, 80, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_heads", [3, 9, 33])
def test_a_decoded_token_equals_the_same_token_of_a_prompt(dtype: torch.dtype, head_dim: int, num_heads: int) -> None:
    length = 2 * SPLIT_TOKENS + 77
    sequence = LongSequence(num_tokens=length, head_dim=head_dim, dtype=dtype, num_heads=num_heads)
    lengths = (*range(1, 70), 128, SPLIT_TOKENS, SPLIT_TOKENS + 1, 2 * SPLIT_TOKENS + 1, length)

    (whole,) = sequence.attend((0, length))
    decoded = sequence.attend(*((position - 1, position) for position in lengths))

    for position, one in zip(lengths, decoded, strict=True):
        assert torch.equal(one[0], whole[position - 1]), position


def test_native_results_do_not_depend_on_batch_chunk_or_threads() -> None:
    sequence = LongSequence(num_tokens=700)
    torch.set_num_threads(1)
    (whole,) = sequence.attend((0, 700))
    (last,) = sequence.attend((699, 700))
    torch.set_num_threads(2)
    try:
        mixed = sequence.attend((699, 700), (0, 333), (10, 11), (333, 700), (699, 700))
    finally:
        torch.set_num_threads(1)

    assert torch.equal(torch.cat([mixed[1], mixed[3]]), whole)
    assert torch.equal(mixed[0], last)
    assert torch.equal(mixed[4], last)


def test_buckets_waste_at_most_half_and_are_few() -> None:
    for num_pages in range(1, 2000):
        assert num_pages <= _bucket(num_pages) < 2 * num_pages + 1
    assert len({_bucket(num_pages) for num_pages in range(1, 2000)}) <= 22
