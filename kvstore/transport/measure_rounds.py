"""How fast this machine moves KV between two processes, in interleaved rounds; what `celeriac bench kv` runs.

    python -m kvstore.transport.measure_rounds <rounds> <MiB per transfer> [shm,tcp,rdma [words of cases]]
Prints one JSON object.

A round does each case once, in an order that turns from round to round; all cases of a round are compared with the
memmove of the same round, so a drift of the machine falls on both sides.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

import msgspec

from kvstore.native.pages import CellDigests, Pages
from kvstore.transport.measure_pair import Memory, NodeSpec, ReaderProcess, Writer
from kvstore.transport.measure_unlike import unlike_specs
from kvstore.transport.region import KVRegion

PROTOCOLS: Final = ("shm", "tcp")
LARGE_BYTES: Final = 1 << 20
SMALL_BYTES: Final = 16 << 10
NOTICE_BYTES: Final = 64 << 10
NOTICES_PER_ROUND: Final = 25
PAIR_COUNTS: Final = (1, 2, 4, 8)
WARM_ROUNDS: Final = 2

Case = Callable[[], float]


class Round(msgspec.Struct):
    """Seconds by case; each moves `num_bytes` (`x pairs` of them), the notices are per transfer of 64 KiB."""

    seconds: dict[str, float]
    notice_s: dict[str, list[float]]


class Rounds(msgspec.Struct):
    num_bytes: int
    num_small_blocks: int
    rounds: list[Round]


def specs(num_bytes: int, protocols: Sequence[str] = PROTOCOLS) -> list[NodeSpec]:
    """Every kind of pair that is measured."""
    found = []
    for protocol in protocols:
        large, small = num_bytes // LARGE_BYTES, num_bytes // SMALL_BYTES
        found += [
            NodeSpec(f"{protocol}_contiguous", protocol, LARGE_BYTES, large, False, False),
            NodeSpec(f"{protocol}_contiguous_checked", protocol, LARGE_BYTES, large, True, False),
            NodeSpec(f"{protocol}_16k", protocol, SMALL_BYTES, small, False, True),
            NodeSpec(f"{protocol}_16k_checked", protocol, SMALL_BYTES, small, True, True),
        ]
        if protocol != "rdma":  # it moves pages as they are
            found += unlike_specs(protocol, num_bytes)
    return found


class _Choice:
    """The cases whose names contain one of the words; without words all. memcpy is always one."""

    def __init__(self, words: Sequence[str], protocols: Sequence[str]) -> None:
        self._words = words
        self.notices = [protocol for protocol in protocols if self.has(f"{protocol}_64k_notice")]
        self.pair_counts = {
            protocol: [count for count in PAIR_COUNTS if self.has(f"{protocol}_pairs_{count}")]
            for protocol in protocols
        }

    def has(self, name: str) -> bool:
        return not self._words or any(word in name for word in self._words)

    def needs(self, spec: NodeSpec) -> bool:
        is_crowd = spec.name.endswith("_contiguous") and bool(self.pair_counts[spec.protocol])
        is_noticed = spec.name.endswith("_16k_checked") and spec.protocol in self.notices
        return is_crowd or is_noticed or self.has(spec.name)


def measure_rounds(
    num_rounds: int, num_bytes: int, protocols: Sequence[str] = PROTOCOLS, words: Sequence[str] = ()
) -> Rounds:
    """Args:
        words: measure only the cases whose names contain one of them, such as `notice` or `16k`.

    Raises:
        ValueError: no case has such a name.
        TimeoutError: a reader did not answer.
        RdmaError: `rdma` cannot be used here.
    """
    choice = _Choice(words, protocols)
    wanted = [spec for spec in specs(num_bytes, protocols) if choice.needs(spec)]
    if not wanted:
        raise ValueError(f"no case of {list(protocols)} has a name with one of {list(words)} in it")
    max_pairs = max((max(counts, default=1) for counts in choice.pair_counts.values()), default=1)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="celeriac-kv-"))
        memory, other = Memory(max([num_bytes, *(spec.num_bytes("w") for spec in wanted)])), Memory(num_bytes)
        readers = [
            stack.enter_context(ReaderProcess(wanted if k == 0 else _plain(wanted), folder=folder, name=f"r{k}"))
            for k in range(max_pairs)
        ]
        writers = {spec.name: Writer(memory, spec, readers[0], side="w0", folder=folder) for spec in wanted}
        crowds = {spec.protocol: [writers[spec.name]] for spec in _plain(wanted)}
        for k in range(1, max_pairs):
            for spec in _plain(wanted):
                crowds[spec.protocol].append(Writer(memory, spec, readers[k], side=f"w{k}", folder=folder))
        everyone = {id(writer): writer for crowd in crowds.values() for writer in crowd}
        for writer in [*everyone.values(), *(w for w in writers.values() if id(w) not in everyone)]:
            stack.callback(writer.close)
        cases = _cases(memory.whole, other.whole, writers, crowds, choice)
        rounds = [_round(cases, writers, choice.notices, turn=k) for k in range(WARM_ROUNDS + num_rounds)]
        return Rounds(num_bytes, num_bytes // SMALL_BYTES, rounds[WARM_ROUNDS:])


def _plain(wanted: list[NodeSpec]) -> list[NodeSpec]:
    return [spec for spec in wanted if spec.name.endswith("_contiguous")]


def _cases(
    own: KVRegion, other: KVRegion, writers: dict[str, Writer], crowds: dict[str, list[Writer]], choice: _Choice
) -> dict[str, Case]:
    cases: dict[str, Case] = {"hash": lambda: _hash(other), "copy_and_hash": lambda: _copy_and_hash(own, other)}
    cases |= {name: writer.push_all for name, writer in writers.items()}
    cases = {name: case for name, case in cases.items() if choice.has(name)}
    cases["memcpy"] = lambda: _memcpy(own, other)
    for protocol, crowd in crowds.items():
        for num_pairs in choice.pair_counts[protocol]:
            cases[f"{protocol}_pairs_{num_pairs}"] = _crowd_case(crowd[:num_pairs])
    return cases


def _crowd_case(crowd: list[Writer]) -> Case:
    """All pairs at once: from the first push to the last hand-over."""

    def run() -> float:
        xfers = [writer.reserve(writer.spec.num_blocks) for writer in crowd]
        starts_s = [writer.begin_all(xfer) for writer, xfer in zip(crowd, xfers, strict=True)]
        return max(writer.end() for writer in crowd) - min(starts_s)

    return run


def _memcpy(own: KVRegion, other: KVRegion) -> float:
    start_s = time.monotonic()
    ctypes.memmove(other.address, own.address, other.num_bytes)
    return time.monotonic() - start_s


def _hash(region: KVRegion) -> float:
    """What a receiver adds that has nothing else to do."""
    pages, blocks = _large_blocks(region, region.num_bytes)
    cells = CellDigests(len(blocks), 1)
    start_s = time.monotonic()
    region.ops.hash(pages, blocks, first=0, lo=0, hi=1, cells=cells)
    return time.monotonic() - start_s


def _copy_and_hash(own: KVRegion, other: KVRegion) -> float:
    """Both in one pass, as a writer does over shm."""
    pages, blocks = _large_blocks(other, other.num_bytes)
    source, _ = _large_blocks(own, other.num_bytes)
    cells = CellDigests(len(blocks), 1)
    start_s = time.monotonic()
    own.ops.copy(source, pages, blocks, blocks, first=0, lo=0, hi=1, cells=cells)
    return time.monotonic() - start_s


def _large_blocks(region: KVRegion, num_bytes: int) -> tuple[Pages, range]:
    num_blocks = num_bytes // LARGE_BYTES
    return Pages(region.address, num_blocks, 1, LARGE_BYTES), range(num_blocks)


def _round(cases: dict[str, Case], writers: dict[str, Writer], protocols: Sequence[str], *, turn: int) -> Round:
    names = list(cases)
    step = next(prime for prime in (5, 7, 11, 13) if len(names) % prime)  # so each comes at every place
    first = turn * step % len(names)
    seconds = {name: cases[name]() for name in names[first:] + names[:first]}
    notices = {
        protocol: [
            writers[f"{protocol}_16k_checked"].push_few(NOTICE_BYTES // SMALL_BYTES) for _ in range(NOTICES_PER_ROUND)
        ]
        for protocol in (protocols if turn % 2 else protocols[::-1])
    }
    return Round(seconds, notices)


if __name__ == "__main__":
    chosen = sys.argv[3].split(",") if len(sys.argv) > 3 else PROTOCOLS
    measured = measure_rounds(int(sys.argv[1]), int(sys.argv[2]) << 20, chosen, sys.argv[4:])
    print(msgspec.json.encode(measured).decode(), flush=True)
    os._exit(0)  # NIXL's libraries may crash in the interpreter's teardown
