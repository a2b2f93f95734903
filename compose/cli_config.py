"""`celeriac config`: what the settings are, where each comes from, and whether a file is right."""

from __future__ import annotations

import json
from pathlib import Path

import click

from compose.cli_base import SuggestingGroup
from configs.dump import shown_value, to_yaml
from configs.fields import all_fields
from configs.loader import load_with_origins
from configs.unread import unread_faults

PRESETS = Path(__file__).resolve().parent.parent / "configs" / "presets"


@click.group(cls=SuggestingGroup)
def config() -> None:
    """Show and check settings."""


@config.command()
@click.argument("file", required=False)
@click.option("--origin", is_flag=True, help="Where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object: value and origin by dotted path.")
def show(file: str | None, origin: bool, as_json: bool) -> None:
    """Print all settings as YAML; FILE instead of the default one. Passwords are stars."""
    loaded = load_with_origins(file)
    if as_json:
        values = {
            path: {"value": shown_value(loaded.settings, path), "origin": loaded.origins[path]} for path in all_fields()
        }
        click.echo(json.dumps(values))
    else:
        click.echo(to_yaml(loaded.settings, origins=loaded.origins if origin else None, hide_secrets=True), nl=False)


@config.command()
@click.argument("file")
def check(file: str) -> None:
    """Check FILE (a path, or the name of a preset) as a whole, on any machine."""
    preset = PRESETS / f"{file}.yaml"
    loaded = load_with_origins(preset if not Path(file).exists() and preset.exists() else file, env={})
    for notice in loaded.notices:
        click.echo(f"notice: {notice}")
    for fault in unread_faults(loaded.settings, loaded.origins):
        click.echo(f"notice: `celeriac up` refuses it for now: {fault}")
    click.echo(f"{loaded.file}: valid")
