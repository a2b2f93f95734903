"""Where our worker hooks into Celery's start: options and pool guard (worker), own queue and intake gate (consumer)."""

from __future__ import annotations

from types import MethodType
from typing import Any

from celery import bootsteps

import configs
from configs.errors import ConfigsError
from tasks.errors import TasksError, WorkerStartError
from tasks.gpu_lock import GpuLock, lock_folder
from tasks.names import decode_queue, generate_queue
from tasks.options import WorkerOptions, worker_options
from tasks.pool import EnginePool


class EngineStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Checks the command line before anything starts, pins the GPU, gives the pool its worker and its options."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, w: Any, **given: Any) -> None:
        super().__init__(w, **given)
        self._gpu_lock: GpuLock | None = None
        try:
            self.options = self._checked(w, given)
            self._secret = configs.secret(w.app.celeriac_settings)
        except (TasksError, ConfigsError) as error:
            raise SystemExit(f"celeriac worker: {error}") from error

    def _checked(self, w: Any, given: dict[str, Any]) -> WorkerOptions:
        pool_class = w.pool_cls
        if not (isinstance(pool_class, type) and issubclass(pool_class, EnginePool)):
            raise WorkerStartError(
                what=f"The pool {pool_class!r} has no engine.",
                expected="Start the worker without -P/--pool: `tasks.pool:EnginePool` is chosen by itself.",
            )
        if not w.use_eventloop:
            raise WorkerStartError(
                what="The engine pool needs Celery's event loop.",
                expected="Use a Redis broker, and neither gevent nor eventlet.",
            )
        queues = list(w.app.amqp.queues.consume_from)
        options = worker_options(given, node=w.hostname, queues=queues, settings=w.app.celeriac_settings)
        if options.gpu is not None:
            self._gpu_lock = GpuLock(lock_folder(), options.gpu, share=options.share_gpu)
        return options

    def create(self, w: Any) -> None:
        w.pool.attach_worker(w, self.options, self._secret)

    def terminate(self, w: Any) -> None:  # noqa: ARG002 - Celery's signature
        if self._gpu_lock is not None:
            self._gpu_lock.release()

    stop = terminate


class TaskSourceStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """On every (re)connection: subscribe the worker's own queue, and let the pool decide whether to fetch messages."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, c: Any) -> None:
        pool: EnginePool = c.pool
        model = c.app.celeriac_settings.model.name
        wanted = {
            "prefill": [],
            "decode": [decode_queue(model, c.hostname)],
            "both": [generate_queue(model), decode_queue(model, c.hostname)],
        }[pool.worker_options.role]
        for queue in wanted:
            if not c.task_consumer.consuming_from(queue):
                c.add_task_queue(queue)
        channel = c.task_consumer.channel
        has_credit = channel.qos.can_consume

        def can_consume(_: Any) -> bool:
            # A BRPOP that is out already must be read: a message parked in its reply is in no queue at all.
            return bool(has_credit()) and (bool(channel._in_poll) or pool.takes_messages)

        channel.qos.can_consume = MethodType(can_consume, channel.qos)
