"""What runs: the supervisor's state file, and the registry for what workers say of themselves now."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import configs
from compose.errors import ClusterNotRunning
from compose.run_folder import RunFolder
from kvstore.errors import KVStoreError
from kvstore.state.store import StateStore

STORE_TIMEOUT_S = 1.0


def read_status(run_dir: Path) -> dict[str, Any]:
    """The object that `status --json` prints.

    Raises:
        ClusterNotRunning: nobody holds the run folder.
    """
    folder = RunFolder(run_dir)
    if not folder.is_running:
        raise ClusterNotRunning(run_dir)
    state = folder.read_state()
    workers: list[dict[str, Any]] = state.get("workers", [])
    with contextlib.suppress(KVStoreError, configs.ConfigsError):
        _refresh(workers, configs.load(folder.cluster_file, env={}))
    return {
        "redis": state.get("redis", {}),
        "gateway": state.get("gateway", []),
        "flower": state.get("flower", {}),
        "workers": workers,
        "phase": state.get("phase", "starting"),
        "supervisor_pid": folder.supervisor_pid,
        "run_dir": str(run_dir),
    }


def _refresh(workers: list[dict[str, Any]], settings: configs.Settings) -> None:
    """Fresh beats over what the supervisor saw last; workers that were started by hand are listed, too."""
    store = StateStore(settings.state.state_url, num_shards=settings.state.num_shards, timeout_s=STORE_TIMEOUT_S)
    try:
        beats = {beat.pid: beat for beat in store.workers()}
    finally:
        store.close()
    for worker in workers:
        beat = beats.pop(worker["pid"], None)
        if beat is not None:
            worker.update(engine_pids=list(beat.engine_pids), incarnation=beat.incarnation)
            if beat.draining:
                worker["state"] = "draining"
    for beat in beats.values():
        if not any(beat.node == worker["node"] for worker in workers):
            state = "draining" if beat.draining else "ready"
            worker = {"node": beat.node, "role": beat.role, "pid": beat.pid, "engine_pids": list(beat.engine_pids)}
            workers.append({**worker, "incarnation": beat.incarnation, "state": state})


def status_table(status: dict[str, Any]) -> str:
    """For people."""
    rows = [("PART", "STATE", "PID", "WHERE")]
    for gateway in status["gateway"]:
        rows.append(("gateway", status["phase"], str(gateway["pid"]), gateway["url"]))
    if status["flower"]:
        rows.append(("flower", status["phase"], str(status["flower"]["pid"]), status["flower"]["url"]))
    rows.append(("redis", status["phase"], str(status["redis"].get("pid", "")), str(status["redis"].get("url", ""))))
    for worker in status["workers"]:
        engines = ",".join(map(str, worker["engine_pids"])) or "-"
        rows.append((worker["node"], worker["state"], str(worker["pid"]), f"{worker['role']}, engine {engines}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    )
