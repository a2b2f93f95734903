"""The command line of a worker, for whoever starts one: the supervisor behind `up`, `celeriac worker`, a unit file."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tasks.names import generate_queue, prefill_queue
from tasks.options import Role


def worker_argv(
    *,
    name: str,
    role: Role,
    model: str,
    cpus: Sequence[int] = (),
    gpu: str | None = None,
    share_gpu: bool = False,
    loglevel: str = "INFO",
) -> list[str]:
    """`python -m celery -A tasks worker ...`; `name` is the node name, "%h" in it becomes the host.

    Gossip and mingle are off: with them each worker reads every other worker's events, and starts a second later.
    """
    queue = {"prefill": prefill_queue(model), "decode": f"decode.{model}", "both": generate_queue(model)}[role]
    argv = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", queue, "-n", name, "--role", role]
    argv += ["-l", loglevel, "--without-gossip", "--without-mingle"]
    if cpus:
        argv += ["--cpus", ",".join(map(str, cpus))]
    if gpu is not None:
        argv += ["--gpu", gpu]
    if share_gpu:
        argv.append("--share-gpu")
    return argv
