"""Views of a KV tensor past 2^31 elements. The region is sparse: few of its pages exist."""

from __future__ import annotations

import torch

from engines.kv_region import KVTensor
from kvstore.transport import KVRegion

NUM_LAYERS, NUM_HEADS, BLOCK_SIZE, HEAD_DIM = 2, 2, 32, 64
BLOCK_ELEMENTS = NUM_LAYERS * 2 * NUM_HEADS * BLOCK_SIZE * HEAD_DIM
NUM_BLOCKS = 2**31 // BLOCK_ELEMENTS + 16
FAR = NUM_BLOCKS - 3  # begins 2^31 + 13 blocks of elements from the start


def far_kv() -> KVTensor:
    shared = KVRegion.create(NUM_BLOCKS, NUM_LAYERS, BLOCK_ELEMENTS // NUM_LAYERS * 2)
    shape = (NUM_BLOCKS, NUM_LAYERS, 2, NUM_HEADS, BLOCK_SIZE, HEAD_DIM)
    return KVTensor(torch.frombuffer(shared.buffer, dtype=torch.bfloat16).view(shape), shared)


def test_a_strided_view_past_two_to_the_31_names_the_bytes_of_its_block() -> None:
    tensor = far_kv()
    assert FAR * BLOCK_ELEMENTS > 2**31
    values = torch.randn(BLOCK_SIZE, HEAD_DIM).to(torch.bfloat16)
    tensor.kv[FAR, 1, 1, 1] = values
    page = torch.frombuffer(tensor.shared.run(FAR, 1, 2), dtype=torch.bfloat16)

    assert torch.equal(page.view(2, NUM_HEADS, BLOCK_SIZE, HEAD_DIM)[1, 1], values)
    assert not tensor.shared.block(FAR - 1)[-1] and not any(tensor.shared.run(FAR, 0, 1))
    heads = tensor.kv[:, 1].transpose(2, 3)  # [num_blocks, 2, block_size, num_kv_heads, head_dim]
    assert torch.equal(heads[FAR, 1, :, 1], values)
    assert torch.equal(tensor.kv[[FAR, 0]][0, 1, 1, 1], values)


def test_far_blocks_are_copied_and_their_tails_zeroed() -> None:
    tensor = far_kv()
    tensor.kv[FAR] = 3.0
    tensor.copy_blocks([(FAR, FAR + 2), (FAR, 1)])
    tensor.zero_tail(FAR, 10)

    for block in (FAR + 2, 1):
        assert bool((tensor.kv[block] == 3.0).all())
    assert bool((tensor.kv[FAR, :, :, :, :10] == 3.0).all())
    assert not bool(tensor.kv[FAR, :, :, :, 10:].any())
    assert not bool(tensor.kv[FAR + 1].any())
