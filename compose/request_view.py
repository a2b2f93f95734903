"""One request for people: where it is, and its phases one below the other, as they followed each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import configs
from compose.errors import ClusterNotRunning, UsageProblem
from compose.run_folder import RunFolder
from kvstore.state.keys import is_request_id
from kvstore.state.phases import PHASES
from kvstore.state.records import Record
from kvstore.state.store import StateStore
from webapp.generate import PREFIXES
from webapp.metrics import record_timings_ms

STORE_TIMEOUT_S: Final = 1.0
WIDTH: Final = 40  # of the bars together
KEPT: Final = "a record is kept for 300 s after its end"


def read_request(run_dir: Path, request_id: str) -> dict[str, Any]:
    """The object that `request --json` prints. `request_id` as the API gives it, or without its prefix.

    Raises:
        ClusterNotRunning: nobody holds the run folder.
        UsageProblem: no such request.
        KVStoreError: the state server cannot be reached, or the record cannot be read.
    """
    rid = request_id
    for prefix in PREFIXES.values():
        rid = rid.removeprefix(prefix)
    if not is_request_id(rid):
        raise UsageProblem(f"{request_id!r} is no request id. Expected the `id` of an answer, such as cmpl-...-s00.")
    folder = RunFolder(run_dir)
    if not folder.is_running:
        raise ClusterNotRunning(run_dir)
    settings = configs.load(folder.cluster_file, env={})
    store = StateStore(settings.state.state_url, num_shards=settings.state.num_shards, timeout_s=STORE_TIMEOUT_S)
    try:
        record = store.record(rid)
    finally:
        store.close()
    if record is None:
        raise UsageProblem(f"Request {request_id} is unknown in {run_dir}: {KEPT}.")
    return describe(record)


def describe(record: Record) -> dict[str, Any]:
    """Times in ms."""
    return {
        "id": record.rid,
        "state": record.state.lower(),
        "reason": record.reason,
        "attempts": record.attempts,
        "prompt_tokens": len(record.body.prompt_ids),
        "completion_tokens": sum(record.n),
        "timings_ms": {name: round(ms, 3) for name, ms in record_timings_ms(record).items()},
    }


def request_table(request: dict[str, Any]) -> str:
    """A line about the request, a bar for each phase that is over, and the sums."""
    timings = request["timings_ms"]
    phases = [(name, timings[name]) for name in PHASES if name in timings]
    whole_ms = max(sum(max(ms, 0.0) for _, ms in phases), 1e-9)
    tries = "" if request["attempts"] <= 1 else f", claimed {request['attempts']} times"
    reason = f" ({request['reason']})" if request["reason"] else ""
    lines = [
        f"{request['id']}: {request['state']}{reason}, {request['prompt_tokens']} prompt tokens, "
        f"{request['completion_tokens']} output tokens{tries}"
    ]
    begun_ms = 0.0
    for name, ms in phases:
        before, after = (round(WIDTH * at_ms / whole_ms) for at_ms in (begun_ms, begun_ms + max(ms, 0.0)))
        lines.append(f"  {name:<12}{ms:>10.2f} ms  {' ' * before}{'█' * max(after - before, 1)}")
        begun_ms += max(ms, 0.0)
    sums = [f"{name} {timings[name]:.2f} ms" for name in ("ttft", "handoff", "total") if name in timings]
    if "closure" in timings:
        sums.append(f"the phases miss the total by {abs(timings['closure']):.3f} ms")
    return "\n".join(lines + (["  " + ", ".join(sums)] if sums else []))
