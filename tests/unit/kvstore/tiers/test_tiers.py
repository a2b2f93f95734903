from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvstore.tiers import DiskTier, HostTier, TieredStore, TierError

BLOCK = 64


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def content(number: int) -> bytes:
    return bytes((number * 7 + i) % 256 for i in range(BLOCK))


class Region:
    """Memory of a few blocks."""

    def __init__(self, num_blocks: int = 8) -> None:
        self.memory = bytearray(num_blocks * BLOCK)

    def block(self, block_id: int) -> memoryview:
        return memoryview(self.memory)[block_id * BLOCK : (block_id + 1) * BLOCK]

    def fill(self, block_id: int, number: int) -> None:
        self.block(block_id)[:] = content(number)


def disk(folder: Path, *, max_blocks: int = 8, fingerprint: str = "f") -> DiskTier:
    return DiskTier(folder, fingerprint=fingerprint, max_bytes=max_blocks * (BLOCK + 64), block_bytes=BLOCK)


def settle(store: TieredStore, keys: frozenset[bytes]) -> None:
    """Until the disk thread has answered."""
    end = time.monotonic() + 10
    while store.is_pending(keys):
        assert time.monotonic() < end, "the disk thread did not answer"
        store.poll()


def test_a_spilled_block_comes_back_as_it_was() -> None:
    region = Region()
    store = TieredStore(HostTier(4 * BLOCK, BLOCK), pages=region.block)
    region.fill(0, 1)
    store.spill(key(1), 0)
    region.fill(0, 9)
    assert store.restore(key(1), 3)
    assert bytes(region.block(3)) == content(1)
    assert not store.restore(key(2), 3)


def test_host_memory_drops_what_was_used_least_recently() -> None:
    host = HostTier(2 * BLOCK, BLOCK)
    for number in (1, 2):
        host.put(key(number), memoryview(content(number)))
    host.put(key(1), memoryview(content(1)))
    host.put(key(3), memoryview(content(3)))
    assert [key(n) in host for n in (1, 2, 3)] == [True, False, True]


def test_a_flipped_bit_in_host_memory_is_a_miss() -> None:
    region = Region()
    host = HostTier(2 * BLOCK, BLOCK)
    store = TieredStore(host, pages=region.block)
    region.fill(0, 1)
    store.spill(key(1), 0)
    host._memory[5 + host._slots[key(1)][0] * BLOCK] ^= 1
    assert not store.restore(key(1), 1)
    assert not store.restore(key(1), 1)
    assert store.stats.damaged == 1


def test_blocks_on_disk_survive_a_restart(tmp_path: Path) -> None:
    region = Region()
    store = TieredStore(HostTier(2 * BLOCK, BLOCK), disk(tmp_path), pages=region.block)
    for number in range(4):
        region.fill(0, number)
        store.spill(key(number), 0)
    store.close()

    store = TieredStore(HostTier(8 * BLOCK, BLOCK), disk(tmp_path), pages=region.block)
    keys = store.prefetch([key(n) for n in range(4)])
    assert len(keys) == 4
    settle(store, keys)
    for number in range(4):
        assert store.restore(key(number), number)
        assert bytes(region.block(number)) == content(number)
    store.close()


def test_a_chain_is_fetched_up_to_its_first_gap(tmp_path: Path) -> None:
    region = Region()
    store = TieredStore(HostTier(8 * BLOCK, BLOCK), disk(tmp_path), pages=region.block)
    for number in (0, 1, 3):
        store.spill(key(number), 0)
    store.close()
    store = TieredStore(HostTier(8 * BLOCK, BLOCK), disk(tmp_path), pages=region.block)
    assert store.prefetch([key(n) for n in range(4)]) == {key(0), key(1)}
    store.close()


def test_a_chain_never_pushes_itself_out_of_host_memory(tmp_path: Path) -> None:
    region = Region()
    store = TieredStore(HostTier(4 * BLOCK, BLOCK), disk(tmp_path), pages=region.block)
    for number in range(6):
        store.spill(key(number), 0)
    store.close()
    store = TieredStore(HostTier(4 * BLOCK, BLOCK), disk(tmp_path), pages=region.block)
    assert store.prefetch([key(n) for n in range(6)]) == {key(0), key(1)}
    store.close()


@pytest.mark.parametrize("fault", ["flipped bit", "cut short", "another block's file", "gone"])
def test_a_damaged_file_is_a_miss_and_forgotten(tmp_path: Path, fault: str) -> None:
    tier = disk(tmp_path)
    for number in (1, 2):
        assert tier.put(key(number), content(number))
    path, other = tier._path(key(1)), tier._path(key(2))
    raw = bytearray(path.read_bytes())
    if fault == "flipped bit":
        raw[-3] ^= 4
        path.write_bytes(raw)
    elif fault == "cut short":
        path.write_bytes(raw[:-1])
    elif fault == "another block's file":
        path.write_bytes(other.read_bytes())
    else:
        path.unlink()
    assert tier.read(key(1)) is None
    assert key(1) not in tier
    assert tier.num_damaged == 1
    assert tier.read(key(2)) == content(2)


def test_the_disk_holds_no_more_than_it_may(tmp_path: Path) -> None:
    forgotten: list[bytes] = []
    tier = disk(tmp_path, max_blocks=2)
    tier.on_forget = forgotten.append
    for number in range(4):
        tier.put(key(number), content(number))
    assert forgotten == [key(0), key(1)]
    assert len(list(tmp_path.rglob("*.kv"))) == 2


def test_what_a_crash_left_half_written_is_removed(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    tier.put(key(1), content(1))
    half = tier._path(key(1)).with_suffix(".part")
    half.write_bytes(b"half")
    tier.close()
    tier = disk(tmp_path)
    assert not half.exists()
    assert tier.keys() == [key(1)]


def test_kv_of_another_model_is_never_looked_at(tmp_path: Path) -> None:
    tier = disk(tmp_path, fingerprint="a")
    tier.put(key(1), content(1))
    assert disk(tmp_path, fingerprint="b").keys() == []


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    tier = disk(tmp_path)
    with pytest.raises(TierError, match="in use by another worker"):
        disk(tmp_path)
    tier.close()
    disk(tmp_path).close()


def test_a_full_disk_costs_nothing_but_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = disk(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", refuse)
    assert not tier.put(key(1), content(1))
    assert list(tmp_path.rglob("*.part")) == []
    assert key(1) not in tier


@pytest.mark.parametrize("make", [lambda _: HostTier(BLOCK - 1, BLOCK), lambda path: disk(path, max_blocks=0)])
def test_a_tier_that_holds_no_block_is_refused(tmp_path: Path, make: object) -> None:
    with pytest.raises(TierError, match="at least one block of 64"):
        make(tmp_path)  # type: ignore[operator]
