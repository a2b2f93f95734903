"""Long prompts: what memory an engine needs to compute them in chunks, beyond the model and the prompt's KV.

    peak RSS while the prompt is computed
        =  RSS before  +  KV and model pages touched for the first time  +  working memory

Working memory holds the activations of one chunk, so it must not grow with the prompt. Every prompt has an engine of
its own, which has only computed a few tokens before, and whose malloc gives freed buffers back at once: freed memory
that stays with a process would hide what the next prompt takes. Linux only: the kernel's own figures of the engine
process (VmHWM, which is reset before the prompt; RssShmem, where the KV region is; RssFile, where the files are).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.engine_program import Program
from benchmarks.engine_progress import RoundClock
from benchmarks.engine_rivals import Say
from benchmarks.engine_shapes import BYTES_OF, SHAPES, Shape, write_checkpoint
from benchmarks.engine_solo import solo_program
from benchmarks.stats import Ratio, paired_ratio, percentile

CHUNK_TOKENS: Final = 2048
WARM_TOKENS: Final = 16
GROWTH_GOAL: Final = 1.1  # a mask or a block table of a long prompt is longer; activations are not
_GLIBC: Final = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
_ROOM_TOKENS: Final = 64  # of the context beyond the prompt


@dataclass(frozen=True)
class MemorySpec:
    """`lengths`: prompt tokens, ascending. `chunk_tokens`: of one step."""

    shapes: tuple[Shape, ...]
    lengths: tuple[int, ...]
    num_rounds: int
    dtype: str
    cpus: tuple[int, ...]
    chunk_tokens: int = CHUNK_TOKENS


@dataclass(frozen=True)
class Memory:
    """Of a process, in bytes."""

    rss: int
    peak: int
    mapped: int  # the KV region and files

    @classmethod
    def of(cls, pid: int) -> Memory:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = {name: value for name, _, value in (line.partition(":") for line in lines)}
        rss, peak, shared, files = (
            int(fields[name].split()[0]) << 10 for name in ("VmRSS", "VmHWM", "RssShmem", "RssFile")
        )
        return cls(rss, peak, shared + files)


def quarters(longest: int) -> tuple[int, ...]:
    """
    >>> quarters(16384)
    (4096, 8192, 16384)
    """
    return (longest // 4, longest // 2, longest)


def measure_memory(spec: MemorySpec, *, say: Say) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """A row per shape and length; the ratio of working memory, longest to shortest prompt.

    Raises:
        BenchError: the engine failed, or has no memory for a prompt.
    """
    rows: list[dict[str, Any]] = []
    ratios: dict[str, Ratio] = {}
    for shape in spec.shapes:
        rounds = _run_rounds(spec, shape, say)
        for length in spec.lengths:
            rows.append(_row(spec, shape, length, [each[length] for each in rounds]))
        shortest, longest = ([each[n]["working_bytes"] for each in rounds] for n in (spec.lengths[0], spec.lengths[-1]))
        name = f"working_memory_{spec.lengths[-1]}_vs_{spec.lengths[0]}_{shape.name}"
        ratios[name] = paired_ratio(longest, shortest, goal=GROWTH_GOAL, at_most=True)
    return rows, ratios


def kv_bytes(shape: Shape, num_tokens: int, dtype: str) -> int:
    return 2 * shape.num_layers * shape.kv_size * num_tokens * BYTES_OF[dtype]


def _run_rounds(spec: MemorySpec, shape: Shape, say: Say) -> list[dict[int, dict[str, float]]]:
    longest = spec.lengths[-1]
    clock = RoundClock(shape.name, num_rounds=spec.num_rounds, num_parts=len(spec.lengths), has_warm_up=False)
    rounds: list[dict[int, dict[str, float]]] = []
    with ExitStack() as stack:
        model = stack.enter_context(_model(shape, longest + _ROOM_TOKENS, say))
        env = {
            **_GLIBC,
            "CELERIAC_DECODE__MAX_NUM_BATCHED_TOKENS": str(spec.chunk_tokens),
            "CELERIAC_KV__ENABLE_PREFIX_CACHING": "false",
            "CELERIAC_KV__MEMORY_BYTES": f"{1 + kv_bytes(shape, longest + 2 * _ROOM_TOKENS, spec.dtype) // 2**20}MiB",
        }
        for k in range(spec.num_rounds):
            found = {}
            for number, length in enumerate(spec.lengths):
                with solo_program(model, spec.cpus, spec.dtype, env=env) as engine:
                    found[length] = _measure(engine, length)
                text = f"{length} tokens: {found[length]['working_bytes'] / 1e6:.0f} MB above model and KV"
                say(clock.line(k, number, text))
            rounds.append(found)
    return rounds


def _measure(engine: Program, length: int) -> dict[str, float]:
    pid = int(engine.facts["pid"])
    job = {"num_requests": 1, "concurrency": 1, "output_len": 1}
    engine.run({**job, "input_len": WARM_TOKENS, "seed": 1})
    before = _reset_peak(pid)
    seconds = float(engine.run({**job, "input_len": length, "seed": 2})["seconds"])
    after = Memory.of(pid)
    return {
        "seconds": seconds,
        "peak_bytes": float(after.peak),
        "working_bytes": float(after.peak - before.rss - (after.mapped - before.mapped)),
    }


def _reset_peak(pid: int) -> Memory:
    """Sets VmHWM back to VmRSS (proc(5), clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return Memory.of(pid)


def _row(spec: MemorySpec, shape: Shape, length: int, found: Sequence[dict[str, float]]) -> dict[str, Any]:
    def median(name: str) -> float:
        return percentile([each[name] for each in found], 0.5)

    return {
        "shape": shape.name,
        "num_prompt_tokens": length,
        "chunk_tokens": spec.chunk_tokens,
        "dtype": spec.dtype,
        "num_threads": len(spec.cpus),
        "num_rounds": len(found),
        "tokens_per_s": length / median("seconds"),
        "kv_bytes": kv_bytes(shape, length, spec.dtype),
        "working_bytes": median("working_bytes"),
        "working_bytes_max": max(each["working_bytes"] for each in found),
        "peak_bytes": max(each["peak_bytes"] for each in found),
    }


@contextmanager
def _model(shape: Shape, max_positions: int, say: Say) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"celeriac-{shape.name}-") as folder:
        say(f"{shape.name}: writing random weights with a context of {max_positions} tokens")
        write_checkpoint(shape, Path(folder), max_positions=max_positions)
        yield Path(folder)


def made_shapes(names: Sequence[str]) -> tuple[Shape, ...]:
    """The shapes whose weights are made on the spot, with any context: all but those of the checkout."""
    return tuple(SHAPES[name] for name in names if not SHAPES[name].folder)
