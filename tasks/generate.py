"""`celeriac.generate(rid)`: a wake-up for a worker of role `both`, which computes the prompt and keeps the sequence."""

from __future__ import annotations

from celery import Celery, Task

from tasks.engine_task import EngineTask
from tasks.errors import NotInEnginePool
from tasks.names import GENERATE_TASK


def register(app: Celery) -> Task:
    @app.task(base=EngineTask, name=GENERATE_TASK)  # type: ignore[untyped-decorator]
    def generate(rid: str) -> None:  # noqa: ARG001 - the signature is what callers see; the pool's engine does the work
        raise NotInEnginePool(task=GENERATE_TASK)

    return generate
