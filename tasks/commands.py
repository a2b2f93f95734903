"""Control commands of a worker: `celery -A tasks control drain [seconds]`, `celery -A tasks inspect celeriac_stats`."""

from __future__ import annotations

from typing import Any

from celery.worker.control import Panel, control_command, inspect_command

from tasks.pool import EnginePool


def drain(state: Any, deadline: float | None = None, **_: Any) -> dict[str, str]:
    """Take nothing new, finish what is here (at most `deadline` seconds), hand back the rest, and exit.

    The event loop stays alive meanwhile, so inspect, revoke and heartbeats work until the end.
    """
    pool = state.consumer.pool
    if not isinstance(pool, EnginePool):
        return {"error": "this worker has no engine pool"}
    for queue in list(state.consumer.task_consumer.queues):
        state.consumer.cancel_task_queue(getattr(queue, "name", queue))
    num_live = pool.drain(None if deadline is None else float(deadline))
    return {"ok": f"draining {num_live} tasks"}


def celeriac_stats(state: Any, **_: Any) -> dict[str, Any]:
    """Engine, blocks and requests of this worker."""
    pool = state.consumer.pool
    return dict(pool.engine_info()) if isinstance(pool, EnginePool) else {}


def install() -> None:
    """Register the commands. Importing alone does nothing, so that a second application is no surprise."""
    if "drain" not in Panel.data:
        control_command(args=[("deadline", float)], signature="[seconds]")(drain)
        inspect_command()(celeriac_stats)
