"""A long prompt takes its KV and the working memory of one chunk, and no more."""

from __future__ import annotations

from benchmarks.engine_memory import MemorySpec, measure_memory
from benchmarks.engine_shapes import Shape
from benchmarks.engine_speed import first_cpus

# Wide, so that the activations of a chunk are large beside what else a process takes.
WIDE = Shape("wide", hidden=256, num_layers=2, num_heads=8, num_kv_heads=2, intermediate=4096, vocab=1024)
MIB = 2**20


def _working_bytes(lengths: tuple[int, ...], chunk_tokens: int) -> list[float]:
    spec = MemorySpec(
        shapes=(WIDE,), lengths=lengths, num_rounds=1, dtype="float32", cpus=first_cpus(1), chunk_tokens=chunk_tokens
    )
    rows, _ = measure_memory(spec, say=lambda _: None)
    return [row["working_bytes"] for row in rows]


def test_working_memory_does_not_grow_with_the_prompt() -> None:
    shorter, longer = _working_bytes((2048, 4096), 256)

    assert longer < shorter + 4 * MIB, (shorter, longer)


def test_without_chunks_it_would_grow() -> None:
    shorter, longer = _working_bytes((2048, 4096), 8192)

    assert longer > 1.6 * shorter > 64 * MIB, (shorter, longer)
