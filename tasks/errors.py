"""What can go wrong in `tasks`, as one tree.

TasksError(retryable)
├── WorkerStartError           a worker that cannot start as it was asked to; says which option to change
│   └── GpuInUse               another worker of this host is pinned to that GPU
├── NotInEnginePool            an engine task reached a pool that has no engine
└── RequestEnded               why a Celery task did not succeed, for Flower and the log
    ├── RequestFailed          the engine cannot serve it: finished as FAILED
    └── RequestExpired         its deadline passed
"""

from __future__ import annotations


class TasksError(Exception):
    """Base of all errors of this package. `retryable`: the same call may succeed later, unchanged."""

    retryable: bool = False


class WorkerStartError(TasksError):
    """A worker was asked for something that it cannot be."""

    def __init__(self, *, what: str, expected: str) -> None:
        super().__init__(f"{what} {expected}")
        self.what = what
        self.expected = expected


class GpuInUse(WorkerStartError):
    """A second worker asked for the same GPU of this host."""

    def __init__(self, *, gpu: str, holder_pid: int) -> None:
        super().__init__(
            what=f"GPU {gpu} is already pinned by the worker with pid {holder_pid} on this host.",
            expected="Use another `--gpu`, stop that worker, or start both with `--share-gpu`.",
        )
        self.gpu = gpu
        self.holder_pid = holder_pid


class NotInEnginePool(TasksError):
    """The body of an engine task ran: there is no engine in this pool."""

    def __init__(self, *, task: str) -> None:
        super().__init__(
            f"{task} ran in a pool without an engine. It needs `tasks.pool:EnginePool`, which `celery -A tasks worker` "
            "chooses by itself: start the worker without -P/--pool."
        )
        self.task = task


class RequestEnded(TasksError):
    """Base: a Celery task ended, and not with success."""

    def __init__(self, rid: str, code: str, message: str) -> None:
        super().__init__(f"{rid}: {code}: {message}" if message else f"{rid}: {code}")
        self.rid = rid
        self.code = code


class RequestFailed(RequestEnded):
    """Finished as FAILED; the client has got `code`."""


class RequestExpired(RequestEnded):
    """The deadline passed while this worker had it."""
