"""What this machine can do for an engine: memory bandwidth and matrix products. The roofs of `celeriac bench engine`.

    python -m engines.machine_rates --cpus 0,1 --dtype bfloat16 --device cpu

Reads one JSON object per line of standard input and answers each:

    {"measure": "bandwidth"}   -> {"seconds": ..., "bytes": ...}     reads of a buffer much larger than the caches
    {"measure": "gemm"}        -> {"seconds": ..., "flops": ...}     a square product, as large as in a prefill

Rates of the machine as torch reaches them, with the threads and cores that the engine has: a roof that can be reached.
On a GPU the time is between two events of its own, so that launching is not counted.
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

from engines.errors import DeviceUnavailable
from engines.factory import choose_device, keep_products_exact

BUFFER_BYTES = {"cpu": 512 << 20, "cuda": 2 << 30}
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
MEASURE_S = 0.3


@click.command()
@click.option("--cpus", default="", help="Core numbers with commas; empty: all.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(cpus: str, dtype: str, device: str) -> None:
    """Measure on demand."""
    cores = [int(cpu) for cpu in cpus.split(",") if cpu]
    if cores:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(len(cores))
    torch.set_grad_enabled(False)
    try:
        choose_device(device)
    except DeviceUnavailable as error:
        raise click.ClickException(str(error)) from error
    keep_products_exact(device)
    buffer = torch.ones(BUFFER_BYTES[device] // 4, device=device)
    size, seconds_of = GEMM_SIZE[device], _seconds_of if device == "cpu" else _gpu_seconds_of
    matrix = torch.randn(size, size).to(device=device, dtype=getattr(torch, dtype))
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    print(json.dumps({"num_threads": torch.get_num_threads(), "device": name}), flush=True)
    for line in sys.stdin:
        measure = json.loads(line)["measure"]
        if measure == "bandwidth":
            result = {"seconds": seconds_of(lambda: buffer.sum()), "bytes": float(BUFFER_BYTES[device])}
        elif measure == "gemm":
            result = {"seconds": seconds_of(lambda: F.linear(matrix, matrix)), "flops": 2.0 * size**3}
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


def _gpu_seconds_of(call: Callable[[], object]) -> float:
    """The same by the GPU's clock."""
    best = float("inf")
    end = time.perf_counter() + MEASURE_S
    while True:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        before.record()
        call()
        after.record()
        after.synchronize()
        best = min(best, float(before.elapsed_time(after)) / 1e3)
        if time.perf_counter() >= end:
            return best


if __name__ == "__main__":
    main()
