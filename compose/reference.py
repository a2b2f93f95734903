"""Reference pages made out of the program: settings, commands, states, metrics. `make docs` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import click

from compose.cli import cli
from compose.reference_states import metrics_page, states_page
from configs.fields import all_fields, section_doc
from configs.unread import UNREAD
from configs.values import expectation, format_value

ROOT = Path(__file__).resolve().parent.parent
MADE = "<!-- Made by `make docs`. Change {source}, not this page. -->"


def configuration_page() -> str:
    """Every setting: type and range, default, what it is for."""
    lines = [
        MADE.format(source="`configs/schema.py`"),
        "# Settings",
        "",
        "Where a value comes from, the strongest first: flags of the command line, the environment",
        "(`CELERIAC_<SECTION>__<NAME>`), a YAML file (`--config`, or `$CELERIAC_CONFIG`, or the cluster that runs in",
        "the default run folder), the default. `celeriac config show --origin` tells for each; `celeriac config check",
        "FILE` checks a file whole. Sizes have their unit: `512MiB` is 2^20 based, `2GB` is 10^9 based. In a file,",
        "`${NAME}` stands for a variable of the environment.",
        "",
        "The cluster secret is in no setting: it is the file `secret_file` (mode 0600), or `$CELERIAC_CLUSTER_SECRET`,",
        "one per line while it is rotated (docs/security.md).",
    ]
    section = None
    for path, field in all_fields().items():
        head = path.rpartition(".")[0]
        if head != section:
            section = head
            title, text = (f"`{head}`", section_doc(head)) if head else ("At the top", "Folders of a local cluster.")
            lines += ["", f"## {title}", "", text, "", "| Setting | Value | Default | |", "|---|---|---|---|"]
        default = format_value(field, field.default) or '""'
        description = field.description
        if path in UNREAD:
            description += f" **Refused by `up` beyond its default for now:** {UNREAD[path][1]}."
        lines.append(f"| `{path}` | {expectation(field)} | `{default}` | {description} |")
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """`--help` of every command."""
    lines = [MADE.format(source="the commands in `compose/`"), "# The command `celeriac`", ""]
    lines.append(
        "Exit codes: 0 done, 1 failed, 2 wrong usage or settings, 3 this machine or what runs on it, 130 interrupted."
    )
    for name, command in _walk(cli, "celeriac"):
        context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100)
        context.help_option_names = ["-h", "--help"]
        lines += ["", f"## {name}", "", "```", command.get_help(context).rstrip(), "```"]
    return "\n".join(lines) + "\n"


def _walk(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    yield name, command
    if isinstance(command, click.Group):
        for child in sorted(command.commands):
            yield from _walk(command.commands[child], f"{name} {child}")


def _made(source: str) -> str:
    return MADE.format(source=source)


PAGES: dict[str, Callable[[], str]] = {
    "docs/configuration.md": configuration_page,
    "docs/cli.md": cli_page,
    "docs/states.md": lambda: states_page(_made),
    "docs/metrics.md": lambda: metrics_page(_made),
}


def main() -> None:
    for path, page in PAGES.items():
        (ROOT / path).write_text(page())


if __name__ == "__main__":
    main()
