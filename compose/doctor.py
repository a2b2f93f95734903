"""`celeriac doctor`: what this machine is, and what a cluster would miss on it. Starts nothing that stays."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from compose.local import is_external
from compose.ports import port_problem
from compose.preflight import Findings, available_memory_bytes, check_model, server_problems, visible_gpus
from compose.run_folder import RunFolder
from configs.dump import without_password
from configs.loader import Loaded
from engines.models.source import ModelSourceError, resolve_model
from kvstore.errors import KVStoreError
from kvstore.state.embedded import binary_path
from kvstore.state.server_facts import server_facts
from kvstore.transport.measure import measure_links
from kvstore.transport.rdma import device_names, nixl_version

Verdict = Literal["ok", "warn", "fail"]
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16")
MIN_MEMORY_BYTES = 3 << 30
MIN_SHM_BYTES = 64 << 20
MIN_FILES = 4096


@dataclass(frozen=True)
class Check:
    name: str
    verdict: Verdict
    text: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    checks: tuple[Check, ...]

    @property
    def has_failed(self) -> bool:
        return any(check.verdict == "fail" for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.has_failed, "checks": [asdict(check) for check in self.checks]}


def diagnose(loaded: Loaded) -> Diagnosis:
    """All checks, in the order in which a start would need them."""
    checks = [_python(), _cpu(), _memory(), _shm(), _files(), _gpu(), _state_server(loaded)]
    checks += _ports(loaded)
    checks.append(_model(loaded))
    checks += _transports()
    return Diagnosis(tuple(checks))


def print_diagnosis(diagnosis: Diagnosis, echo: Callable[[str], None]) -> None:
    width = max(len(check.name) for check in diagnosis.checks)
    for check in diagnosis.checks:
        echo(f"{check.verdict:<5} {check.name:<{width}}  {check.text}")


def _python() -> Check:
    text = f"Python {platform.python_version()} in {sys.prefix}"
    return Check("python", "ok" if sys.version_info >= (3, 11) else "fail", text)


def _cpu() -> Check:
    flags: set[str] = set()
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
        elif line.startswith(("flags", "Features")):
            flags = set(line.split(":", 1)[1].split())
            break
    have = [flag for flag in CPU_FLAGS if flag in flags]
    cores = len(os.sched_getaffinity(0))
    slow = "" if "avx2" in flags or platform.machine() == "aarch64" else "; without AVX2 it will be slow"
    figures = {"model": model, "num_cores": cores, "features": have}
    return Check(
        "cpu", "warn" if slow else "ok", f"{model}, {cores} cores, {' '.join(have) or 'no AVX'}{slow}", figures
    )


def _memory() -> Check:
    free = available_memory_bytes()
    verdict: Verdict = "ok" if free >= MIN_MEMORY_BYTES else "warn"
    hint = "" if verdict == "ok" else "; two workers want about 3 GiB, lower `kv.memory_bytes`"
    return Check("memory", verdict, f"{free / 2**30:.1f} GiB available{hint}", {"available_bytes": free})


def _shm() -> Check:
    """memfd pages count against the same limits as /dev/shm in some containers; NCCL and CUDA use the folder itself."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Check("shm", "warn", "there is no /dev/shm; start the container with --shm-size=1g")
    verdict: Verdict = "ok" if free > MIN_SHM_BYTES else "warn"
    hint = "" if verdict == "ok" else "; start the container with --shm-size=1g"
    return Check("shm", verdict, f"{free / 2**20:.0f} MiB free in /dev/shm{hint}", {"free_bytes": free})


def _files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    verdict: Verdict = "ok" if soft >= MIN_FILES else "warn"
    hint = "" if verdict == "ok" else f"; each stream needs one, `ulimit -n {min(65536, hard)}`"
    return Check("open files", verdict, f"limit {soft} (hard {hard}){hint}", {"soft": soft, "hard": hard})


def _gpu() -> Check:
    gpus = visible_gpus()
    return Check("gpu", "ok", ", ".join(gpus) or "none; workers compute on the CPU", {"gpus": gpus})


def _state_server(loaded: Loaded) -> Check:
    url = loaded.settings.state.state_url
    try:
        if not is_external(loaded):
            return Check("state server", "ok", f"embedded Valkey, {binary_path()}")
        facts = server_facts(url)
    except KVStoreError as error:
        return Check("state server", "fail", f"{without_password(url)}: {error}")
    problems = server_problems(facts)
    return Check("state server", "fail" if problems else "ok", "; ".join([facts.name, *problems]), asdict(facts))


def _ports(loaded: Loaded) -> list[Check]:
    settings = loaded.settings
    if RunFolder(Path(settings.run_dir)).is_running:
        return [Check("ports", "ok", f"held by the cluster that runs in {settings.run_dir}")]
    checks = []
    for name, part in (("gateway port", settings.gateway), ("flower port", settings.flower)):
        problem = port_problem(part.host, part.port) if part.port else ""
        checks.append(Check(name, "fail" if problem else "ok", problem or f"{part.host}:{part.port} is free"))
    return checks


def _model(loaded: Loaded) -> Check:
    """A hub id that is not here yet is not downloaded for a check."""
    settings, found = loaded.settings, Findings()
    if (
        "/" in settings.model.path
        and not Path(settings.model.path).exists()
        and settings.model.path != "models/tiny-chat"
    ):
        return Check("model", "warn", f"{settings.model.path} is not a folder here: `up` asks the hub for it")
    try:
        folder = resolve_model(settings.model.path, settings.model.revision)
    except ModelSourceError as error:
        return Check("model", "fail", str(error))
    check_model(settings, folder, found)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    text = "; ".join([f"{settings.model.name}: {weights / 1e6:.1f} MB of weights in {folder}", *found.problems])
    return Check("model", "fail" if found.problems else "ok", text, {"weights_bytes": weights})


def _transports() -> list[Check]:
    """Measured between two processes of this machine, half a second each."""
    checks = []
    for protocol in ("shm", "tcp"):
        try:
            (speed,) = measure_links((protocol,))
        except (OSError, TimeoutError, KVStoreError) as error:
            checks.append(Check(f"transport {protocol}", "fail", f"could not be measured: {error}"))
            continue
        text = f"{speed.gigabytes_per_s:.2f} GB/s, {speed.memcpy_ratio:.0%} of memcpy"
        figures = {"gb_per_s": speed.gigabytes_per_s, "memcpy_ratio": speed.memcpy_ratio}
        checks.append(Check(f"transport {protocol}", "ok", text, figures))
    return [*checks, _rdma()]


def _rdma() -> Check:
    """Not measured: without a device it is one more way over tcp, and a link between hosts needs two of them."""
    version, devices = nixl_version(), device_names()
    if not version:
        verdict: Verdict = "warn" if devices else "ok"
        return Check("transport rdma", verdict, f"NIXL is not installed; {_named(devices)}")
    return Check("transport rdma", "ok", f"{version}; {_named(devices)}")


def _named(devices: list[str]) -> str:
    return f"devices {', '.join(devices)}" if devices else "no RDMA device, `auto` does without it"
