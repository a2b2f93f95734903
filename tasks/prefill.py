"""`celeriac.prefill(rid)`: a wake-up for a prefill worker. Runs from the claim until the KV is handed over."""

from __future__ import annotations

from celery import Celery, Task

from tasks.engine_task import EngineTask
from tasks.errors import NotInEnginePool
from tasks.names import PREFILL_TASK


def register(app: Celery) -> Task:
    @app.task(base=EngineTask, name=PREFILL_TASK)  # type: ignore[untyped-decorator]
    def prefill(rid: str) -> None:  # noqa: ARG001 - the signature is what callers see; the pool's engine does the work
        raise NotInEnginePool(task=PREFILL_TASK)

    return prefill
