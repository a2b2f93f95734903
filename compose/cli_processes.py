"""`celeriac worker` and `celeriac gateway`: one process, in the foreground, as the supervisor starts it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import click

import configs
from configs.loader import CONFIG_VARIABLE

PR_SET_PDEATHSIG = 1
_QUEUES = {"prefill": "prefill.{model}", "decode": "decode.{model}.{node}", "both": "generate.{model}"}


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@click.option("--role", type=click.Choice(["prefill", "decode", "both"]), required=True)
@click.option("-n", "--name", help="Node name, such as p0. [default: the role and this process's id]")
@click.option("--gpu", help="GPU of this worker; without it: the first one that is visible, or the CPU.")
@click.option("--share-gpu", is_flag=True, help="Allow another worker on the same GPU.")
@click.option("--cpus", help="Cores of this worker's engine, such as 0-3.")
@click.option("--config", "config_file", metavar="FILE", help="Settings; without it those of the running cluster.")
@click.pass_context
def worker(
    ctx: click.Context,
    role: str,
    name: str | None,
    gpu: str | None,
    share_gpu: bool,
    cpus: str | None,
    config_file: str | None,
) -> None:
    """Run one worker: `celery -A tasks worker` with the right queue. Other options go to Celery."""
    import socket

    if config_file:
        os.environ[CONFIG_VARIABLE] = os.path.abspath(config_file)  # noqa: PTH100 - no symlink is resolved
    settings = configs.load()
    node = name or f"{role[0]}-{os.getpid()}"
    node = node if "@" in node else f"{node}@{socket.gethostname()}"
    queue = _QUEUES[role].format(model=settings.model.name, node=node)
    argv = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "-Q", queue, "-n", node, "--role", role]
    argv += ["--gpu", gpu] if gpu is not None else []
    argv += ["--share-gpu"] if share_gpu else []
    argv += ["--cpus", cpus] if cpus else []
    argv += ["--loglevel", "INFO", "--without-gossip", "--without-mingle", *ctx.args]
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.execv(sys.executable, argv)


@click.command()
@click.option("--host", help="Address to listen on.")
@click.option("--port", help="Port to listen on.")
@click.option("--config", "config_file", metavar="FILE", help="Settings; without it those of the running cluster.")
def gateway(host: str | None, port: str | None, config_file: str | None) -> None:
    """Run one gateway (Flask behind gunicorn)."""
    flags = {path: text for path, text in (("gateway.host", host), ("gateway.port", port)) if text is not None}
    names = {"gateway.host": "--host", "gateway.port": "--port"}
    settings = configs.load_with_origins(config_file, flags=flags, flag_names=names).settings
    # gunicorn forks its workers; one whose master was killed must not go on with its streams.
    libc, master = ctypes.CDLL(None), os.getpid()

    def die_with_master() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != master:
            os._exit(1)

    os.register_at_fork(after_in_child=die_with_master)

    from webapp.server import run_gateway

    run_gateway(settings)
