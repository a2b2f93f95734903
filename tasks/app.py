"""The Celery application `celeriac`: `celery -A tasks worker -Q prefill.tiny-chat -n p0@%h`, inspect, control, flower.

Settings come from `configs.load()` when this module is imported, so that the command line needs none of them.
"""

from __future__ import annotations

from typing import Any

from celery import Celery
from celery.signals import celeryd_init
from click import Choice, IntRange, Option

import configs
from configs.origin_check import check_origin
from configs.schema import Settings
from tasks import commands, decode, generate, prefill, worker_logs
from tasks.bootsteps import EngineStep, TaskSourceStep
from tasks.conf import configure, configure_worker
from tasks.errors import WorkerStartError
from tasks.options import default_concurrency, worker_options


def make_app(settings: Settings) -> Celery:
    """The application of one cluster, with the engine pool, its options and its control commands."""
    application = Celery("celeriac", set_as_current=True)
    application.celeriac_settings = settings
    configure(application, settings)
    configure_worker(application)
    for module in (prefill, decode, generate):
        module.register(application)
    application.user_options["worker"].update(
        (
            Option(("--role",), type=Choice(["prefill", "decode", "both"]), help="Role; without it, what -Q says."),
            Option(
                ("--gpu",),
                help="CUDA_VISIBLE_DEVICES of this worker's engine. Without: the first visible GPU, or the CPU.",
            ),
            Option(("--share-gpu",), is_flag=True, help="Allow another worker of this host on the same GPU."),
            Option(
                ("--tensor-parallel-size",),
                type=IntRange(1, 64),
                help="Ranks that compute this worker's model together. Without: what the settings of its role say.",
            ),
            Option(("--cpus",), help="Cores of this worker's engine, such as 0-3."),
        )
    )
    application.steps["worker"].add(EngineStep)
    application.steps["consumer"].add(TaskSourceStep)
    commands.install()
    worker_logs.install()
    return application


@celeryd_init.connect  # type: ignore[untyped-decorator]
def _set_concurrency(sender: str, conf: Any, options: dict[str, Any], instance: Any, **_: Any) -> None:
    """Without -c, a worker holds as many messages as its engine can have live. Bad options are told by `EngineStep`."""
    settings = getattr(instance.app, "celeriac_settings", None)
    if settings is None or options.get("concurrency"):
        return
    queues = options.get("queues") or ()
    names = queues.split(",") if isinstance(queues, str) else list(queues)
    try:
        role = worker_options({**options, "cpus": None}, node=sender, queues=names, settings=settings).role
    except WorkerStartError:
        return
    conf.worker_concurrency = default_concurrency(role, settings)


check_origin()
app = make_app(configs.load())
