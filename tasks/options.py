"""What one worker is: role, device, cores. From the command line, checked before anything starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from configs.schema import Settings
from tasks.errors import WorkerStartError

Role = Literal["prefill", "decode", "both"]
_ROLE_OF_PREFIX: dict[str, Role] = {"prefill": "prefill", "decode": "decode", "generate": "both"}


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """`gpu`: index as CUDA_VISIBLE_DEVICES takes it, None for the CPU. `cpus` empty: wherever the OS runs it.
    `tensor_parallel_size` None: what the settings of the role say.
    """

    node: str
    role: Role
    gpu: str | None = None
    share_gpu: bool = False
    cpus: tuple[int, ...] = ()
    tensor_parallel_size: int | None = None


def parse_cpus(text: str) -> tuple[int, ...]:
    """Core numbers of "0-3,6".

    Raises:
        WorkerStartError: not of that form, or not a core that this process may use.
    """
    cores: set[int] = set()
    try:
        for part in text.split(","):
            low, _, high = part.strip().partition("-")
            cores.update(range(int(low), int(high or low) + 1))
    except ValueError:
        raise WorkerStartError(
            what=f"--cpus {text!r} is not a list of cores.", expected="Write it as 0-3 or 0,2,4-5."
        ) from None
    usable = os.sched_getaffinity(0)
    if not cores or not cores <= usable:
        raise WorkerStartError(
            what=f"--cpus {text!r} names cores that this process may not use.",
            expected=f"Choose among {sorted(usable)}.",
        )
    return tuple(sorted(cores))


def role_of_queues(queues: Iterable[str]) -> Role | None:
    """The role that `-Q` asks for, None if no queue of ours is among them."""
    roles = {
        _ROLE_OF_PREFIX[prefix] for prefix in (name.split(".", 1)[0] for name in queues) if prefix in _ROLE_OF_PREFIX
    }
    return next(iter(roles)) if len(roles) == 1 else ("both" if roles else None)


def worker_options(given: Mapping[str, Any], *, node: str, queues: Iterable[str], settings: Settings) -> WorkerOptions:
    """Options of a worker out of its command line (`given`: click's parameters).

    Raises:
        WorkerStartError: no role, a queue of a model that this cluster does not serve, or bad cores.
    """
    names = list(queues)
    role = given.get("role") or role_of_queues(names)
    if role is None:
        raise WorkerStartError(
            what=f"The queues {names or ['(none)']} name no role.",
            expected=f"Start it with `-Q prefill.{settings.model.name}` (or decode., generate.), or with `--role`.",
        )
    for name in names:
        prefix, _, rest = name.partition(".")
        model = settings.model.name
        if prefix in _ROLE_OF_PREFIX and rest != model and not rest.startswith(f"{model}."):
            raise WorkerStartError(
                what=f"The queue {name!r} belongs to another model than {model!r}, which the settings name.",
                expected=f"Use `-Q {prefix}.{model}`, or set `model.path` (CELERIAC_MODEL__PATH) to that model.",
            )
    cpus = given.get("cpus")
    return WorkerOptions(
        node=node,
        role=role,
        gpu=given.get("gpu"),
        share_gpu=bool(given.get("share_gpu")),
        cpus=parse_cpus(cpus) if cpus else (),
        tensor_parallel_size=given.get("tensor_parallel_size"),
    )


def with_ranks(settings: Settings, options: WorkerOptions) -> Settings:
    """The settings of a worker whose command line names its number of ranks."""
    if options.tensor_parallel_size is None:
        return settings
    role = settings.prefill if options.role == "prefill" else settings.decode
    own = msgspec.structs.replace(role, tensor_parallel_size=options.tensor_parallel_size)
    return msgspec.structs.replace(settings, **{"prefill" if options.role == "prefill" else "decode": own})


def default_concurrency(role: Role, settings: Settings) -> int:
    """Celery messages that a worker holds, running and waiting: its prefetch credit.

    A prefill worker forms its next batch out of messages that are here already, so it holds two; the others hold what
    can be live, and a tenth more.
    """
    if role == "prefill":
        return 2 * settings.prefill.max_batch_size
    num_live = settings.decode.max_num_seqs
    waiting = settings.prefill.max_batch_size if role == "both" else 0
    return num_live + max(2, num_live // 10) + waiting
