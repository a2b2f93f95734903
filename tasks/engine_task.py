"""Base of the tasks whose work is done by the pool's engine, not by their body."""

from __future__ import annotations

from celery import Task


class EngineTask(Task):  # type: ignore[misc]
    """`EnginePool` keeps the Celery request of such a task and tells it what the engine reports. No retry here: the
    state server repeats wake-ups, under ids of its own."""

    abstract = True
    is_engine_task = True
    acks_late = True
    ignore_result = True
    max_retries = 0
