"""The command `celeriac`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from compose.cli_base import SuggestingGroup, chosen_run_dir, fail, run_cli, run_dir_option
from compose.cli_config import config
from compose.cli_kv import kv
from compose.cli_processes import gateway, worker
from compose.errors import ClusterNotRunning, ComposeError, EnvironmentProblem, UsageProblem
from compose.logs import follow_logs, print_logs
from compose.run_folder import RunFolder
from configs.errors import ConfigsError
from configs.loader import load_with_origins

UP_FLAGS: Mapping[str, str] = {
    "model": "model.path",
    "prefill": "prefill.num_workers",
    "decode": "decode.num_workers",
    "both": "both.num_workers",
    "port": "gateway.port",
    "flower_port": "flower.port",
    "dtype": "model.dtype",
    "run_dir": "run_dir",
}


@click.group(cls=SuggestingGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="celeriac", message="celeriac %(version)s")
def cli() -> None:
    """Serve large language models with prefill and decode disaggregated, as a Celery/Redis pipeline.

    `celeriac up` starts a whole cluster on this machine. Settings come from flags, then from the environment
    (CELERIAC_TRANSFER__PROTOCOL=tcp), then from a YAML file; `celeriac config show` lists them.
    """


@cli.command()
@click.option("--model", help="Folder with a Hugging Face model, or a hub id.")
@click.option("--prefill", metavar="N", help="Prefill workers.")
@click.option("--decode", metavar="N", help="Decode workers.")
@click.option("--both", metavar="N", help="Workers that prefill and decode; alone unless the others are given, too.")
@click.option("--port", metavar="PORT", help="Port of the gateway; 0 takes a free one.")
@click.option("--flower-port", metavar="PORT", help="Port of Flower; 0 takes a free one.")
@click.option("--redis-url", metavar="URL", help="Redis or Valkey to use, instead of one of our own.")
@click.option("--dtype", help="auto, float32 or bfloat16.")
@click.option("--config", "config_file", metavar="FILE", help="Settings, such as configs/presets/local.yaml.")
@click.option(
    "--set", "assignments", metavar="KEY=VALUE", multiple=True, help="Any setting: --set transfer.protocol=tcp."
)
@click.option("--detach", is_flag=True, help="Return when it is ready; it stays in the background.")
@run_dir_option
def up(**given: Any) -> None:
    """Start a cluster on this machine and stay until Ctrl-C; `down` ends a detached one."""
    from compose.detach import detached
    from compose.local import check_settings, run_local, setup_logging

    flags, names = up_flags(given)
    loaded = load_with_origins(given["config_file"], flags=flags, flag_names=names, join_running=False)
    check_settings(loaded)
    env = dict(os.environ)
    folder = RunFolder(Path(loaded.settings.run_dir))

    if not given["detach"]:
        setup_logging()
        run_local(loaded, env=env, report=lambda line: click.echo(line), ready=sys.stdout.flush)
        return

    def work(report: Any, verdict: Any) -> None:
        setup_logging()
        try:
            run_local(loaded, env=env, report=report, ready=lambda: verdict(0))
        except (ComposeError, ConfigsError) as error:
            for line in str(error).splitlines():
                report(f"celeriac: {line}")
            verdict(getattr(error, "exit_code", 2))

    code = detached(work, log_path=folder.log_path("supervisor"), show=lambda line: click.echo(line))
    if code:
        click.echo(f"celeriac: the cluster did not start; see {folder.path / 'logs'}", err=True)
        sys.exit(code)


def up_flags(given: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Settings by dotted path out of the flags of `up`, and how messages call each.

    Raises:
        UsageProblem: `--set` without a value.
    """
    from compose.local import redis_urls

    flags: dict[str, str] = {}
    names: dict[str, str] = {}
    for assignment in given["assignments"]:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UsageProblem(f"--set {assignment}: no value. Expected `--set section.name=value`.")
        flags[path.strip()] = text.strip()
    for name, path in UP_FLAGS.items():
        if given[name] is not None:
            flags[path] = str(given[name])
            names[path] = "--" + name.replace("_", "-")
    if given["redis_url"] is not None:
        flags.update(redis_urls(given["redis_url"]))
        names.update(dict.fromkeys(redis_urls(given["redis_url"]), "--redis-url"))
    if given["both"] is not None:
        for role in ("prefill", "decode"):  # monolithic workers alone, unless others are asked for, too
            if given[role] is None:
                flags.setdefault(f"{role}.num_workers", "0")
                names[f"{role}.num_workers"] = "--both"
    return flags, names


@cli.command()
@run_dir_option
@click.option("--timeout", default=90.0, show_default=True, help="Seconds to wait for the drain; then it is killed.")
def down(run_dir: Path | None, timeout: float) -> None:
    """End a cluster in order: what runs is finished first."""
    folder = RunFolder(chosen_run_dir(run_dir))
    pid = folder.supervisor_pid
    if not folder.is_running or pid is None:
        raise ClusterNotRunning(folder.path)
    os.kill(pid, signal.SIGTERM)
    end_s = time.monotonic() + timeout
    while folder.is_running:
        if time.monotonic() >= end_s:
            os.kill(pid, signal.SIGKILL)
            raise EnvironmentProblem(f"The cluster in {folder.path} did not end within {timeout:g} s and was killed.")
        time.sleep(0.05)
    click.echo("stopped")


@cli.command()
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(run_dir: Path | None, as_json: bool) -> None:
    """Show what runs."""
    from compose.status import read_status, status_table

    current = read_status(chosen_run_dir(run_dir))
    click.echo(json.dumps(current) if as_json else status_table(current))


@cli.command()
@click.argument("request_id", metavar="ID")
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def request(request_id: str, run_dir: Path | None, as_json: bool) -> None:
    """Show where a request is and how long each of its phases took."""
    from compose.request_view import read_request, request_table

    found = read_request(chosen_run_dir(run_dir), request_id)
    click.echo(json.dumps(found) if as_json else request_table(found))


@cli.command()
@click.argument("name", required=False)
@run_dir_option
@click.option("-f", "--follow", is_flag=True, help="Go on with what is written from now on.")
@click.option("-n", "--lines", default=40, show_default=True, help="Last lines of each log.")
def logs(name: str | None, run_dir: Path | None, follow: bool, lines: int) -> None:
    """Show the logs: of all processes, or of NAME (p0, d0, gateway, flower, supervisor)."""
    folder = RunFolder(chosen_run_dir(run_dir))
    names = print_logs(folder, name, lines, click.echo)
    if follow:
        follow_logs(folder, names, click.echo)


@cli.command()
@run_dir_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--config", "config_file", metavar="FILE", help="Settings to check this machine for.")
def doctor(run_dir: Path | None, as_json: bool, config_file: str | None) -> None:
    """Check this machine: ports, state server, memory, CPU, GPU, model files, speed of each transport."""
    from compose.doctor import diagnose, print_diagnosis

    flags = {"run_dir": str(run_dir)} if run_dir is not None else {}
    loaded = load_with_origins(config_file, flags=flags, flag_names={"run_dir": "--run-dir"})
    diagnosis = diagnose(loaded)
    if as_json:
        click.echo(json.dumps(diagnosis.as_json()))
    else:
        print_diagnosis(diagnosis, click.echo)
    if diagnosis.has_failed:
        sys.exit(3)


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def bench(args: tuple[str, ...]) -> None:
    """Measure a running cluster: `bench serve`, `bench compare`, ... (source checkout only)."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "cli.py").exists():
        raise EnvironmentProblem(
            f"There is no benchmarks/ beside {root / 'compose'}: the wheel does not carry it. "
            "Expected a source checkout; clone the repository and run `make bench`."
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))
    from benchmarks.cli import bench as group

    group.main(args=list(args), prog_name="celeriac bench", standalone_mode=False)


@cli.command("version")
def show_version() -> None:
    """Print the version."""
    try:
        click.echo(f"celeriac {version('celeriac')}")
    except PackageNotFoundError:
        fail(EnvironmentProblem("Celeriac is not installed. Expected `pip install -e .` in this folder."), 3)


cli.add_command(config)
cli.add_command(kv)
cli.add_command(worker)
cli.add_command(gateway)


def main() -> None:
    """Entry point of the console command, and of `python -m celeriac`."""
    run_cli(cli)


if __name__ == "__main__":
    main()
