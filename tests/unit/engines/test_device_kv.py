"""Parts of KV that lies apart from what peers can map: slots, sizes, copies, blocks as bytes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engines.device_kv.copies import HostCopies, TensorCopies, merged
from engines.device_kv.sizing import AUTOMATIC_MAX_BYTES, BounceSize
from engines.device_kv.slot_pool import Direction, SlotPool
from engines.device_kv.staged_blocks import StagedBlocks
from engines.errors import BounceTooSmall
from kvstore.blocks import OutOfBlocks
from kvstore.transport import KVRegion

OUT, IN = Direction.OUTGOING, Direction.INCOMING
NUM_BLOCKS, NUM_SLOTS, NUM_LAYERS = 12, 7, 3


def test_each_direction_leaves_the_other_room_for_its_largest_transfer() -> None:
    slots = SlotPool(10, max_per_transfer=3)
    slots.allocate(IN, 3)
    slots.allocate(IN, 3)
    with pytest.raises(OutOfBlocks) as error:
        slots.allocate(IN, 2)
    assert (error.value.needed, error.value.free) == (2, 1)
    assert len(slots.allocate(OUT, 3)) == 3


def test_slots_that_were_refused_are_not_taken() -> None:
    slots = SlotPool(4, max_per_transfer=2)
    first = slots.allocate(OUT, 2)
    with pytest.raises(OutOfBlocks):
        slots.allocate(OUT, 1)
    slots.check_invariants()
    slots.free(OUT, first)
    assert (slots.num_free, slots.held(OUT)) == (4, 0)


def _size(bounce_bytes: int, device: str = "cuda", block_bytes: int = 1 << 20) -> BounceSize | None:
    return BounceSize.choose(
        bounce_bytes, device=device, block_bytes=block_bytes, block_size=32, max_model_len=320
    )  # 10 blocks, and one more where a peer's are of another size


def test_kv_on_a_cpu_is_bounced_only_if_it_is_asked_for() -> None:
    assert _size(0, device="cpu") is None
    assert _size(32 << 20, device="cpu") == BounceSize(num_slots=32, max_per_transfer=11)


def test_the_automatic_size_on_a_gpu_is_four_contexts_up_to_a_limit_and_never_below_two() -> None:
    assert _size(0) == BounceSize(num_slots=44, max_per_transfer=11)
    assert _size(0, block_bytes=64 << 20) == BounceSize(AUTOMATIC_MAX_BYTES // (64 << 20), 11)
    assert _size(0, block_bytes=1 << 30) == BounceSize(num_slots=22, max_per_transfer=11)


def test_a_bounce_region_without_room_for_both_directions_is_refused_by_name() -> None:
    with pytest.raises(BounceTooSmall, match=r"`kv.bounce_bytes` is 21.0 MiB. Expected at least 22.0 MiB") as error:
        _size(21 << 20)
    assert error.value.needed_bytes == 22 << 20


def _memories(tail: tuple[int, ...]) -> tuple[Tensor, KVRegion, Tensor]:
    """Device KV, a region of slots, the region as a tensor; all of it random."""
    kv = torch.randn((NUM_BLOCKS, NUM_LAYERS, *tail))
    region = KVRegion.create(NUM_SLOTS, NUM_LAYERS, kv[0, 0].numel() * kv.itemsize)
    slots = torch.frombuffer(region.buffer, dtype=kv.dtype).view(NUM_SLOTS, *kv.shape[1:])
    slots.copy_(torch.randn(slots.shape))
    return kv, region, slots


@pytest.mark.parametrize("kind", ["host", "tensor"])
def test_copies_move_what_they_name_and_nothing_else(kind: str) -> None:
    rng = random.Random(3)
    kv, region, slots = _memories((2, 2, 8, 16))
    copies = HostCopies(kv, region) if kind == "host" else TensorCopies(kv, slots)
    for _ in range(50):
        num = rng.randrange(1, NUM_SLOTS)
        pairs = list(zip(rng.sample(range(NUM_BLOCKS), num), rng.sample(range(NUM_SLOTS), num), strict=True))
        if rng.random() < 0.5:
            pairs = [(block, block % NUM_SLOTS) for block in range(num)]  # neighbours: one run
        lo, hi = sorted(rng.sample(range(NUM_LAYERS + 1), 2))
        expected_slots, expected_kv = slots.clone(), kv.clone()
        for block, slot in pairs:
            expected_slots[slot, lo:hi] = kv[block, lo:hi]
        copies.save(copies.gate(), pairs, lo, hi)
        assert torch.equal(slots, expected_slots)

        slots.copy_(torch.randn(slots.shape))
        for block, slot in pairs:
            expected_kv[block] = slots[slot]
        copies.load(copies.gate(), [(slot, block) for block, slot in pairs])
        assert torch.equal(kv, expected_kv)


def test_runs_of_neighbours_are_merged_only_if_both_sides_go_on() -> None:
    assert merged([(0, 5), (1, 6), (2, 8), (3, 9), (7, 1)]) == [(0, 5, 2), (2, 8, 2), (7, 1, 1)]
    assert merged([]) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_staged_block_is_its_bytes_and_what_is_written_into_it_gets_back(dtype: torch.dtype) -> None:
    kv = torch.randn((4, NUM_LAYERS, 2, 8)).to(dtype)
    before = kv.clone()
    staged = StagedBlocks(kv)
    view = staged.read(2)
    assert bytes(view) == before[2].view(torch.uint8).numpy().tobytes()

    view[:] = bytes(range(48)) * (len(view) // 48)
    assert torch.equal(kv, before), "not before it is told"
    staged.write_back(1)
    assert kv[1].view(torch.uint8).flatten().tolist() == list(range(48)) * (len(view) // 48)
    assert torch.equal(kv[[0, 2, 3]], before[[0, 2, 3]])
