"""`celeriac.decode(rid)`: shows a handed-over sequence to Celery. The receiver never waits for it."""

from __future__ import annotations

from celery import Celery, Task

from tasks.engine_task import EngineTask
from tasks.errors import NotInEnginePool
from tasks.names import DECODE_TASK


def register(app: Celery) -> Task:
    @app.task(base=EngineTask, name=DECODE_TASK)  # type: ignore[untyped-decorator]
    def decode(rid: str) -> None:  # noqa: ARG001 - the signature is what callers see; the pool's engine does the work
        raise NotInEnginePool(task=DECODE_TASK)

    return decode
