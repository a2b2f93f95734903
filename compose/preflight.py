"""What this machine must have for these settings, checked before anything starts; every problem is reported at once."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from compose.errors import EnvironmentProblem
from compose.gpus import why_no_cuda
from compose.layout import worker_roles
from compose.ports import port_problem
from configs.dump import without_password
from configs.schema import Settings
from configs.units import format_size
from engines.device_kv.sizing import BounceSize
from engines.errors import BounceTooSmall, ModelError
from engines.models.context import context_length
from kvstore.errors import StateUnavailable
from kvstore.state.server_facts import ServerFacts, server_facts
from kvstore.transport.errors import RdmaError
from kvstore.transport.rdma import usable_protocols

MIN_REDIS: Final = (7, 0)
MIN_VALKEY: Final = (7, 2)
BASE_MEMORY_PER_WORKER: Final = 450 << 20  # interpreter, torch and the front, measured on an idle worker
DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "auto": 2}


@dataclass
class Findings:
    """`problems` stop the start, `notices` are printed."""

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def raise_if_any(self) -> None:
        """Raises: EnvironmentProblem: with every problem, a line each."""
        if self.problems:
            raise EnvironmentProblem("\n".join(self.problems))


def check_ports(settings: Settings, found: Findings) -> None:
    parts = [("gateway", settings.gateway.host, settings.gateway.port)]
    if settings.flower.enabled:
        parts.append(("flower", settings.flower.host, settings.flower.port))
    for name, host, port in parts:
        problem = port_problem(host, port) if port else ""
        if problem:
            found.problems.append(
                f"{name}: {problem}. Expected to listen on {host}:{port}; free it, or choose another `{name}.port`."
            )


def check_transfer(settings: Settings, found: Findings) -> None:
    """What `transfer.protocol` asks for is installed."""
    try:
        usable_protocols(settings.transfer.protocol)
    except RdmaError as error:
        found.problems.append(f"transfer.protocol: {error.detail}. Expected that, or `auto`, `shm` or `tcp`.")


def check_redis(settings: Settings, found: Findings) -> ServerFacts | None:
    """An external server: reachable, new enough, and one that forgets nothing."""
    facts = None
    for path, url in (
        ("state.broker_url", settings.state.broker_url),
        ("state.state_url", settings.state.state_url),
    ):
        if not url.startswith(("redis://", "rediss://", "unix://")):
            continue
        try:
            facts = server_facts(url)
        except StateUnavailable as error:
            found.problems.append(
                f"{path}: no server answers at {without_password(url)} ({error.detail}). Expected Redis >= 7 or "
                "Valkey >= 7.2; start it, or leave `--redis-url` out for an embedded one."
            )
            continue
        found.problems += [f"{path}: {problem}" for problem in server_problems(facts)]
    return facts


def server_problems(facts: ServerFacts) -> list[str]:
    """What an external server must be told before it may hold requests."""
    problems = []
    least = MIN_VALKEY if facts.is_valkey else MIN_REDIS
    if facts.version < least:
        problems.append(f"found {facts.name}. Expected at least {'.'.join(map(str, least))}: functions need it.")
    if facts.maxmemory_policy != "noeviction":
        problems.append(
            f"maxmemory-policy is {facts.maxmemory_policy}. Expected noeviction: an evicted record is a lost request; "
            "run `CONFIG SET maxmemory-policy noeviction`."
        )
    if facts.role != "master":
        problems.append(f"the server is a {facts.role}. Expected a primary that takes writes.")
    if facts.is_cluster:
        problems.append("the server is a cluster node. Expected a single server: Celery's broker cannot use a cluster.")
    return problems


def check_workers(settings: Settings, found: Findings) -> None:
    """That some way leads from a prompt to tokens."""
    roles = set(worker_roles(settings))
    if not roles:
        found.problems.append("No worker is planned. Expected `--prefill N --decode N`, or `--both N`.")
    elif "both" not in roles and roles != {"prefill", "decode"}:
        (there,) = roles
        missing = "decode" if there == "prefill" else "prefill"
        found.problems.append(f"There are {there} workers only. Expected `--{missing} 1` or more, or `--both N`.")


def check_model(settings: Settings, folder: Path, found: Findings) -> None:
    """KV for one longest request fits a worker, and all workers fit this machine."""
    try:
        config = json.loads((folder / "config.json").read_text())
        limit = context_length(folder)
    except (OSError, ValueError, ModelError) as error:
        found.problems.append(f"model.path: {folder / 'config.json'} cannot be used ({error}).")
        return
    if settings.model.max_model_len > limit:
        found.problems.append(
            f"model.max_model_len: {settings.model.max_model_len} is above the model's limit {limit}."
        )
        return
    try:
        block_bytes = kv_bytes_per_block(config, settings)
    except (KeyError, TypeError, ValueError, AttributeError):
        found.notices.append("kv: how much memory a token takes shows only when the model is loaded; workers check it.")
        return
    longest = settings.model.max_model_len or limit
    num_blocks = settings.kv.num_blocks or settings.kv.memory_bytes // block_bytes
    needed = -(-longest // settings.kv.block_size)
    if num_blocks < needed:
        found.problems.append(
            f"kv: one request of {longest} tokens needs {needed} blocks of {format_size(block_bytes)} = "
            f"{needed * block_bytes / 2**30:.2f} GiB, and a worker has {num_blocks} blocks. Expected `kv.memory_bytes` "
            f"of at least {-(-needed * block_bytes // 2**20)}MiB, or a smaller `model.max_model_len`."
        )
    bounce_bytes = settings.kv.bounce_bytes
    if bounce_bytes:
        try:
            BounceSize.choose(
                bounce_bytes,
                device="cpu",
                block_bytes=block_bytes,
                block_size=settings.kv.block_size,
                max_model_len=longest,
            )
        except BounceTooSmall as error:
            found.problems.append(f"kv: {error}")
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    per_worker = weights + num_blocks * block_bytes + bounce_bytes + BASE_MEMORY_PER_WORKER
    num_workers, free = len(worker_roles(settings)), available_memory_bytes()
    if per_worker * num_workers > free:
        found.notices.append(
            f"memory: {num_workers} workers may use {per_worker * num_workers / 2**30:.1f} GiB "
            f"(each {weights / 2**30:.2f} weights + {num_blocks * block_bytes / 2**30:.2f} KV + "
            f"{BASE_MEMORY_PER_WORKER / 2**30:.2f} program), and {free / 2**30:.1f} GiB are available; "
            "lower `kv.memory_bytes` if it runs short."
        )


def kv_bytes_per_block(config: Mapping[str, Any], settings: Settings) -> int:
    """Keys and values of `block_size` tokens over all layers.

    Raises:
        KeyError: the model's config lacks a figure.
    """
    heads = int(config["num_attention_heads"])
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // heads)
    kv_heads = int(config.get("num_key_value_heads") or heads)
    size = DTYPE_BYTES[settings.model.dtype]
    return int(config["num_hidden_layers"]) * 2 * kv_heads * settings.kv.block_size * head_dim * size


def check_hardware(settings: Settings, found: Findings) -> None:
    """What the settings were written for and this machine lacks. A notice where they may work all the same."""
    gpus = visible_gpus()
    has_gpu = bool(gpus) or Path("/dev/dxg").exists()  # WSL shows its GPU there only
    missing = why_no_cuda(version("torch"), has_gpu=has_gpu)
    for role, workers in (
        ("prefill", settings.prefill.num_workers),
        ("decode", settings.decode.num_workers + settings.both.num_workers),
    ):
        if missing and workers and getattr(settings, role).device == "cuda":
            found.problems.append(f"{role}.device is cuda: {missing}, or set `{role}.device` to auto or cpu.")
    for role in ("prefill", "decode"):
        wanted = getattr(settings, role).hardware
        if wanted and not any(name in gpu for gpu in gpus for name in wanted.split(" or ")):
            found.notices.append(f"{role}: written for {wanted}; this machine has {', '.join(gpus) or 'no GPU'}.")
    if settings.transfer.gbps:
        found.notices.append(f"transfer: written for a link of {settings.transfer.gbps:g} Gbit/s.")


def visible_gpus() -> list[str]:
    """Models of the GPUs whose driver is loaded."""
    names = []
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(errors="replace").splitlines():
            if line.startswith("Model:"):
                names.append(line.split(":", 1)[1].strip())
    return names


def available_memory_bytes() -> int:
    """What the kernel says can be had without swapping, and no more than this process's group may use."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        if limit != "max":
            available = min(available, int(limit) - used)
    except (OSError, ValueError):
        pass
    return available
