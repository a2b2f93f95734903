"""Which GPU each worker of a local cluster is pinned to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"


def usable_gpus(env: Mapping[str, str], num_here: int) -> tuple[str, ...]:
    """GPUs as `--gpu` takes them: those that the environment leaves visible, else all `num_here` of the machine.

    >>> [usable_gpus(env, 4) for env in ({}, {"CUDA_VISIBLE_DEVICES": "1,3"}, {"CUDA_VISIBLE_DEVICES": ""})]
    [('0', '1', '2', '3'), ('1', '3'), ()]
    """
    visible = env.get(VARIABLE)
    if visible is None:
        return tuple(map(str, range(num_here)))
    return tuple(name.strip() for name in visible.split(",") if name.strip()) if num_here else ()


def divide_gpus(gpus: Sequence[str], wants_gpu: Sequence[bool]) -> tuple[list[tuple[str, ...]], str]:
    """Arguments for each worker, and a notice if some must share. Workers that compute on the CPU get none.

    >>> divide_gpus(["0", "1"], [True, False, True])
    ([('--gpu', '0'), (), ('--gpu', '1')], '')
    """
    num_workers = sum(wants_gpu)
    if not gpus or not num_workers:
        return [()] * len(wants_gpu), ""
    is_shared = num_workers > len(gpus)
    arguments: list[tuple[str, ...]] = []
    taken = 0
    for wants in wants_gpu:
        if not wants:
            arguments.append(())
            continue
        arguments.append(("--gpu", gpus[taken % len(gpus)], *(["--share-gpu"] if is_shared else [])))
        taken += 1
    notice = f"{num_workers} workers share {len(gpus)} GPUs: each takes `kv.memory_bytes` of its GPU's memory."
    return arguments, notice if is_shared else ""


def why_no_cuda(torch_version: str, *, has_gpu: bool) -> str:
    """What `device: cuda` lacks here; empty if nothing does.

    Args:
        torch_version: as its package says. Importing it to ask would take seconds.

    >>> why_no_cuda("2.13.0+cpu", has_gpu=True)
    'torch 2.13.0+cpu was built for CPUs only; set up again with `TORCH=cuda make setup`'
    """
    if torch_version.endswith("+cpu"):
        return f"torch {torch_version} was built for CPUs only; set up again with `TORCH=cuda make setup`"
    return "" if has_gpu else "no driver shows an NVIDIA GPU; check `nvidia-smi`"
