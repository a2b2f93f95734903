"""`celeriac up` on one machine: from settings to a running supervisor.

check settings -> lock the run folder -> model files -> ports and server -> state server -> cluster.yaml -> supervise
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from compose.errors import EnvironmentProblem
from compose.gpus import usable_gpus
from compose.layout import plan_cluster
from compose.ports import free_port
from compose.preflight import (
    Findings,
    check_hardware,
    check_model,
    check_ports,
    check_redis,
    check_transfer,
    check_workers,
    visible_gpus,
)
from compose.readiness import flower_url, gateway_url
from compose.run_folder import RunFolder
from compose.supervisor import Report, Supervisor
from configs.errors import ConfigError
from configs.loader import Loaded, with_values
from configs.schema import Settings
from configs.unread import unread_faults
from engines.models.source import ModelSourceError, resolve_model
from kvstore.errors import KVStoreError
from kvstore.state.embedded import EmbeddedValkey

GHOST_END_S = 10.0


def check_settings(loaded: Loaded) -> None:
    """What can be told from the settings alone, before anything is touched.

    Raises:
        ConfigError: a setting has a value that nothing reads.
    """
    faults = unread_faults(loaded.settings, loaded.origins)
    if faults:
        raise ConfigError(faults)


def run_local(loaded: Loaded, *, env: Mapping[str, str], report: Report, ready: Callable[[], None]) -> None:
    """Start the cluster and stay until a signal ends it.

    Raises:
        ConfigError, ComposeError: it could not start; nothing is left running.
    """
    check_settings(loaded)
    folder = RunFolder(Path(loaded.settings.run_dir))
    folder.acquire()
    valkey: EmbeddedValkey | None = None
    try:
        _wait_for_ghosts(folder)
        loaded = _with_model(loaded, report)
        loaded, redis_pid = _with_machine(loaded, report)
        if not is_external(loaded):
            valkey = EmbeddedValkey(folder.valkey_dir)
            loaded = _with_valkey(loaded, valkey)
            report(f"valkey: ready (pid {valkey.pid}, {valkey.url})")
        settings = loaded.settings
        folder.write_settings(settings)
        plan = plan_cluster(
            settings,
            cluster_file=folder.cluster_file,
            cores=sorted(os.sched_getaffinity(0)),
            hostname=socket.gethostname(),
            env=env,
            gpus=usable_gpus(env, len(visible_gpus())),
        )
        for notice in plan.notices:
            report(f"notice: {notice}")
        supervisor = Supervisor(settings, plan, folder, valkey=valkey, redis_pid=redis_pid, report=report)

        def say_ready() -> None:
            for line in ready_lines(settings):
                report(line)
            ready()

        supervisor.run(say_ready)
    finally:
        if valkey is not None:
            valkey.stop()
        folder.release()


def is_external(loaded: Loaded) -> bool:
    """Whether somebody named a server; else one is started."""
    return not (loaded.is_default("state.broker_url") and loaded.is_default("state.state_url"))


def redis_urls(url: str) -> dict[str, str]:
    """`--redis-url`: Celery's messages in the named database, request state in the next one.

    >>> redis_urls("redis://db:6379/3")
    {'state.broker_url': 'redis://db:6379/3', 'state.state_url': 'redis://db:6379/4'}
    """
    parts = urlsplit(url)
    number = parts.path.lstrip("/")
    if not number.isdigit():
        number = "0"
    with_number = [urlunsplit(parts._replace(path=f"/{n}")) for n in (int(number), int(number) + 1)]
    return {"state.broker_url": with_number[0], "state.state_url": with_number[1]}


def ready_lines(settings: Settings) -> list[str]:
    """The last lines of a start: where it is, and a request that works."""
    url = gateway_url(settings)
    body = (
        f'{{"model": "{settings.model.name}", "stream": true, '
        '"messages": [{"role": "user", "content": "Count from 1 to 5."}]}'
    )
    lines = [f"flower {flower_url(settings)}"] if settings.flower.enabled else []
    return [
        *lines,
        f"ready {url}",
        f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
    ]


def _with_model(loaded: Loaded, report: Report) -> Loaded:
    """The model's folder, downloaded once here, so that no worker needs the network or this working folder."""
    model = loaded.settings.model
    started_s = time.monotonic()
    try:
        folder = resolve_model(model.path, model.revision)
    except ModelSourceError as error:
        raise EnvironmentProblem(f"model.path ({loaded.origins['model.path']}): {error}") from error
    report(f"model: {model.name} in {folder} ({time.monotonic() - started_s:.1f} s)")
    values = {"model.served_model_name": model.name, "model.path": str(folder.absolute())}
    return _decided(loaded, values)


def _with_machine(loaded: Loaded, report: Report) -> tuple[Loaded, int]:
    """Ports instead of 0; everything that this machine lacks at once. Also the process id of an external server."""
    settings, found = loaded.settings, Findings()
    check_workers(settings, found)
    check_ports(settings, found)
    check_transfer(settings, found)
    check_model(settings, Path(settings.model.path), found)
    check_hardware(settings, found)
    facts = check_redis(settings, found) if is_external(loaded) else None
    for notice in (*loaded.notices, *found.notices):
        report(f"notice: {notice}")
    found.raise_if_any()
    ports = {
        f"{part}.port": free_port(getattr(settings, part).host)
        for part in ("gateway", "flower")
        if not getattr(settings, part).port
    }
    return _decided(loaded, ports), facts.pid if facts else 0


def _with_valkey(loaded: Loaded, valkey: EmbeddedValkey) -> Loaded:
    try:
        url = valkey.start()
    except KVStoreError as error:
        raise EnvironmentProblem(str(error)) from error
    return _decided(loaded, redis_urls(url))


def _decided(loaded: Loaded, values: Mapping[str, Any]) -> Loaded:
    """With values that `up` has decided. They keep their origin: whether somebody set them is asked later."""
    origins = dict(loaded.origins)
    return replace(with_values(loaded, values, "celeriac up"), origins=origins)


def _wait_for_ghosts(folder: RunFolder) -> None:
    """The state server of a killed supervisor may still be writing its last second into the same folder."""
    pid = int(folder.read_state().get("redis", {}).get("pid") or 0)
    end_s = time.monotonic() + GHOST_END_S
    marker = str(folder.valkey_dir).encode()
    while pid and time.monotonic() < end_s:
        try:
            if marker not in Path(f"/proc/{pid}/cmdline").read_bytes():
                return
        except OSError:
            return
        time.sleep(0.05)


def setup_logging() -> None:
    """Of the supervisor itself: warnings of evictions and wake-ups, on standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
