"""How every command of `celeriac` behaves: suggestions, exit codes, colour, a closed pipe.

Exit codes: 0 done, 1 a bug or a failed check, 2 usage or settings, 3 this machine, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from compose.errors import ComposeError
from configs.errors import ConfigsError, ShadowedPackage
from configs.origin_check import check_origin
from configs.run_dir import default_run_dir
from configs.suggest import did_you_mean
from kvstore.errors import KVStoreError


class SuggestingGroup(click.Group):
    """A group that knows what was probably meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            hint = did_you_mean(args[0], self.list_commands(ctx))
            if hint and "did you mean" not in error.message.lower():
                raise click.UsageError(f"{error.message} {hint[0].upper()}{hint[1:]}", ctx) from None
            raise


def fail(error: Exception, code: int) -> NoReturn:
    """Print and leave."""
    for line in str(error).splitlines() or [type(error).__name__]:
        click.echo(f"celeriac: {line}", err=True)
    sys.exit(code)


def run_cli(cli: click.Command, args: Sequence[str] | None = None) -> NoReturn:
    """Run a command as a program: known errors are lines and exit codes, never a traceback."""
    try:
        check_origin()
        result: Any = cli.main(
            args=list(args) if args is not None else None, prog_name="celeriac", standalone_mode=False
        )
        sys.stdout.flush()
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # `celeriac logs | head`: nobody reads any more. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except ComposeError as error:
        fail(error, error.exit_code)
    except ShadowedPackage as error:
        fail(error, 3)
    except ConfigsError as error:
        fail(error, 2)
    except KVStoreError as error:
        fail(error, 3)


def run_dir_option(command: Any) -> Any:
    """`--run-dir` of the commands that look for a running cluster."""
    return click.option(
        "--run-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Run folder of the cluster. [default: $XDG_STATE_HOME/celeriac/default]",
    )(command)


def chosen_run_dir(run_dir: Path | None) -> Path:
    if run_dir is not None:
        return run_dir.expanduser().absolute()
    given = os.environ.get("CELERIAC_RUN_DIR")
    return (Path(given) if given else default_run_dir(os.environ)).absolute()
