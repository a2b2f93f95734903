"""What this machine can do for an engine: memory bandwidth and matrix products. The roofs of `celeriac bench engine`.

    python -m engines.machine_rates --cpus 0,1 --dtype bfloat16

Reads one JSON object per line of standard input and answers each:

    {"measure": "bandwidth"}   -> {"seconds": ..., "bytes": ...}     reads of a buffer much larger than the caches
    {"measure": "gemm"}        -> {"seconds": ..., "flops": ...}     a square product, as large as in a prefill

Rates of the machine as torch reaches them, with the threads and cores that the engine has: a roof that can be reached.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F  # noqa: N812

BUFFER_BYTES = 512 << 20
GEMM_SIZE = 1024
MEASURE_S = 0.3


@click.command()
@click.option("--cpus", default="", help="Core numbers with commas; empty: all.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
def main(cpus: str, dtype: str) -> None:
    """Measure on demand."""
    cores = [int(cpu) for cpu in cpus.split(",") if cpu]
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    torch.set_grad_enabled(False)
    buffer = torch.ones(BUFFER_BYTES // 4)
    matrix = torch.randn(GEMM_SIZE, GEMM_SIZE).to(getattr(torch, dtype))
    print(json.dumps({"num_threads": torch.get_num_threads()}), flush=True)
    for line in sys.stdin:
        measure = json.loads(line)["measure"]
        if measure == "bandwidth":
            result = {"seconds": _seconds_of(lambda: buffer.sum()), "bytes": float(BUFFER_BYTES)}
        elif measure == "gemm":
            result = {"seconds": _seconds_of(lambda: F.linear(matrix, matrix)), "flops": 2.0 * GEMM_SIZE**3}
        else:
            raise click.UsageError(f"measure {measure!r} is not known. Expected bandwidth or gemm.")
        print(json.dumps(result), flush=True)


def _seconds_of(call: Callable[[], object]) -> float:
    """Best of the calls that fit in `MEASURE_S`: a roof is what the machine does when nothing disturbs it."""
    best = float("inf")
    end = time.perf_counter() + MEASURE_S
    while True:
        started = time.perf_counter()
        call()
        now = time.perf_counter()
        best = min(best, now - started)
        if now >= end:
            return best


if __name__ == "__main__":
    main()
