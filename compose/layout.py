"""Which processes a cluster has, and the command line of each. Pure: settings and cores in, plan out.

Every command can be typed by hand; the environment only says where the settings are.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from compose.gpus import divide_gpus
from configs.loader import CONFIG_VARIABLE, ENV_PREFIX, SECRET_VARIABLE
from configs.schema import Settings
from engines.step_log import VARIABLE as STEP_LOG_VARIABLE
from engines.step_timer import VARIABLE as STEP_PROFILE_VARIABLE

Role = Literal["prefill", "decode", "both"]
NODE_PREFIX: Final[Mapping[Role, str]] = {"prefill": "p", "decode": "d", "both": "b"}
PACKAGE_ROOT: Final = Path(__file__).resolve().parent.parent
_KEPT: Final = (CONFIG_VARIABLE, SECRET_VARIABLE, STEP_LOG_VARIABLE, STEP_PROFILE_VARIABLE)


@dataclass(frozen=True)
class ChildSpec:
    """One process to start. `death_signal`: what the kernel sends it when the supervisor dies."""

    name: str
    kind: Literal["worker", "gateway", "flower"]
    argv: tuple[str, ...]
    env: Mapping[str, str]
    role: str = ""
    node: str = ""
    cpus: tuple[int, ...] = ()
    death_signal: int = signal.SIGKILL


@dataclass(frozen=True)
class ClusterPlan:
    """`notices`: what somebody who reads the start should know."""

    children: tuple[ChildSpec, ...]
    notices: tuple[str, ...] = field(default=())

    def of(self, kind: str) -> list[ChildSpec]:
        return [child for child in self.children if child.kind == kind]


def plan_cluster(
    settings: Settings,
    *,
    cluster_file: Path,
    cores: Sequence[int],
    hostname: str,
    env: Mapping[str, str],
    gpus: Sequence[str] = (),
) -> ClusterPlan:
    """Workers in the order prefill, decode, both; then gateway and Flower.

    Args:
        gpus: as `--gpu` takes them. Workers whose `device` is not cpu are pinned to one each, in turn.
    """
    base = child_env(env, cluster_file)
    roles = worker_roles(settings)
    shares, notice = divide_cores(cores, len(roles))
    pins, gpu_notice = divide_gpus(gpus, [_device_of(settings, role) != "cpu" for role in roles])
    children = []
    counts: dict[Role, int] = {}
    for role, cpus, pin in zip(roles, shares, pins, strict=True):
        index = counts.get(role, 0)
        counts[role] = index + 1
        node = f"{NODE_PREFIX[role]}{index}@{hostname}"
        children.append(_worker(settings, role=role, node=node, cpus=cpus, pin=pin, env=base))
    children.append(ChildSpec("gateway", "gateway", (sys.executable, "-m", "compose.cli", "gateway"), base))
    if settings.flower.enabled:
        children.append(_flower(settings, base))
    return ClusterPlan(tuple(children), tuple(each for each in (notice, gpu_notice) if each))


def worker_roles(settings: Settings) -> list[Role]:
    """One entry per worker."""
    counts: dict[Role, int] = {
        "prefill": settings.prefill.num_workers,
        "decode": settings.decode.num_workers,
        "both": settings.both.num_workers,
    }
    return [role for role, count in counts.items() for _ in range(count)]


def divide_cores(cores: Sequence[int], num_workers: int) -> tuple[list[tuple[int, ...]], str]:
    """Each worker's cores, neighbours together, and a notice if some must share.

    >>> divide_cores([0, 1, 2, 3, 4], 2)
    ([(0, 1, 2), (3, 4)], '')
    """
    if not num_workers:
        return [], ""
    ordered = sorted(cores)
    if len(ordered) < num_workers:
        shared: list[tuple[int, ...]] = [(ordered[i % len(ordered)],) for i in range(num_workers)]
        return shared, f"{num_workers} workers share {len(ordered)} cores: they will slow each other down."
    size, rest = divmod(len(ordered), num_workers)
    shares: list[tuple[int, ...]] = []
    start = 0
    for i in range(num_workers):
        end = start + size + (1 if i < rest else 0)
        shares.append(tuple(ordered[start:end]))
        start = end
    return shares, ""


def core_list(cpus: Sequence[int]) -> str:
    """As `--cpus` takes it.

    >>> core_list((0, 1, 2, 5))
    '0-2,5'
    """
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def child_env(env: Mapping[str, str], cluster_file: Path) -> dict[str, str]:
    """Without settings of ours: flags were stronger than they are, and cluster.yaml has the outcome."""
    kept = {name: value for name, value in env.items() if not name.startswith(ENV_PREFIX) or name in _KEPT}
    return {
        **kept,
        CONFIG_VARIABLE: str(cluster_file),
        "OMP_WAIT_POLICY": env.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONUNBUFFERED": "1",
    }


def _device_of(settings: Settings, role: Role) -> str:
    sizes = settings.prefill if role == "prefill" else settings.decode
    return "cpu" if sizes.tensor_parallel_size > 1 else sizes.device  # ranks compute on the CPU


def _worker(
    settings: Settings, *, role: Role, node: str, cpus: tuple[int, ...], pin: tuple[str, ...], env: Mapping[str, str]
) -> ChildSpec:
    model = settings.model.name
    queue = {
        "prefill": f"prefill.{model}",
        "decode": f"decode.{model}.{node}",
        "both": f"generate.{model}",
    }[role]
    argv = (
        *(sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", queue, "-n", node, "--role", role),
        *("--cpus", core_list(cpus), *pin, "--loglevel", "INFO", "--without-gossip", "--without-mingle"),
    )
    threads = {"OMP_NUM_THREADS": str(len(cpus))}
    return ChildSpec(node.split("@")[0], "worker", argv, {**env, **threads}, role=role, node=node, cpus=cpus)


def _flower(settings: Settings, env: Mapping[str, str]) -> ChildSpec:
    flower = settings.flower
    argv = (
        *(sys.executable, "-m", "celery", "-A", "tasks", "flower"),
        *(f"--address={flower.host}", f"--port={flower.port}"),
    )
    # A password in an argument list is everybody's to read. Without one Flower is on loopback only (configs.relations).
    access = {"FLOWER_BASIC_AUTH": flower.basic_auth} if flower.basic_auth else {"FLOWER_UNAUTHENTICATED_API": "true"}
    return ChildSpec("flower", "flower", argv, {**env, **access})
