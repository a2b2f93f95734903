"""Reads step logs, and compares the steps of two engines that had the same work in them. Pure, apart from the reading.

A step log (engines/step_log.py) has a line per step: num_seqs, num_tokens, num_context_tokens, milliseconds, and CPU
milliseconds of the engine thread.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.stats import percentile

CONTEXT_BIN_TOKENS = 64  # per sequence; at most two blocks more or less to read, of both sides alike
MIN_STEPS = 3  # on either side, for a median


class Step(NamedTuple):
    num_seqs: int
    num_tokens: int
    num_context_tokens: int
    step_ms: float
    cpu_ms: float = math.nan

    @property
    def is_pure_decode(self) -> bool:
        """One token per sequence, no chunk of a prompt."""
        return self.num_tokens == self.num_seqs


class Bin(NamedTuple):
    """Steps that are compared: the same batch size, and about the same context per sequence."""

    num_seqs: int
    context_bin: int


@dataclass(frozen=True)
class BinRatio:
    """Medians of both sides in one bin."""

    bin: Bin
    num_loaded: int
    num_alone: int
    loaded_ms: float
    alone_ms: float
    loaded_cpu_ms: float
    alone_cpu_ms: float

    @property
    def weight(self) -> int:
        """Steps that the comparison rests on."""
        return min(self.num_loaded, self.num_alone)


class StepLogReader:
    """Reads what was appended to one log since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read_new(self) -> list[Step]:
        """Whole lines only; a log that does not exist yet has no steps."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            raw = file.read()
        lines = raw[: raw.rfind(b"\n") + 1]
        self._offset += len(lines)
        return [_parse(line) for line in lines.decode().splitlines()]


def match_bins(loaded: Sequence[Step], alone: Sequence[Step]) -> list[BinRatio]:
    """Pure decode steps of both sides, bin by bin; only bins in which both have enough steps."""
    left, right = _binned(loaded), _binned(alone)
    return [
        BinRatio(
            key,
            len(left[key]),
            len(right[key]),
            *(percentile([step.step_ms for step in side[key]], 0.5) for side in (left, right)),
            *(percentile([step.cpu_ms for step in side[key]], 0.5) for side in (left, right)),
        )
        for key in sorted(left.keys() & right.keys())
        if min(len(left[key]), len(right[key])) >= MIN_STEPS
    ]


def mean_ratio(bins: Sequence[BinRatio]) -> float:
    """Geometric mean of loaded / alone over the bins, weighted by steps. NaN without any."""
    return _weighted([(each.weight, each.loaded_ms / each.alone_ms) for each in bins])


def mean_cpu_ratio(bins: Sequence[BinRatio]) -> float:
    """The same of CPU time: without the time in which the engine waited for a core that others used."""
    return _weighted([(each.weight, each.loaded_cpu_ms / each.alone_cpu_ms) for each in bins])


def batch_sizes(steps: Sequence[Step]) -> tuple[int, int]:
    """25th and 95th percentile of the batch sizes of pure decode steps; (0, 0) without any."""
    sizes = [float(step.num_seqs) for step in steps if step.is_pure_decode]
    return (math.floor(percentile(sizes, 0.25)), math.ceil(percentile(sizes, 0.95))) if sizes else (0, 0)


def _weighted(pairs: Sequence[tuple[int, float]]) -> float:
    total = sum(weight for weight, _ in pairs)
    return math.exp(sum(weight * math.log(ratio) for weight, ratio in pairs) / total) if total else math.nan


def _binned(steps: Sequence[Step]) -> Mapping[Bin, list[Step]]:
    bins: dict[Bin, list[Step]] = defaultdict(list)
    for step in steps:
        if step.is_pure_decode:
            context = step.num_context_tokens // step.num_seqs // CONTEXT_BIN_TOKENS
            bins[Bin(step.num_seqs, context)].append(step)
    return bins


def _parse(line: str) -> Step:
    num_seqs, num_tokens, num_context_tokens, step_ms, cpu_ms = line.split("\t")
    return Step(int(num_seqs), int(num_tokens), int(num_context_tokens), float(step_ms), float(cpu_ms))
