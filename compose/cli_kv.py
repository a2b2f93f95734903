"""`celeriac kv`: questions about KV transfers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from compose.cli_base import SuggestingGroup
from compose.errors import UsageProblem
from engines.models.kv_shape import DTYPE_BYTES, KVShapeError, kv_shape
from kvstore.transport.estimator import TABLE, table_figures


@click.group(cls=SuggestingGroup)
def kv() -> None:
    """KV cache sizes and transfer times."""


@kv.command()
@click.option("--model", required=True, help="Folder of a Hugging Face model, its config.json, or a hub id.")
@click.option("--tokens", type=click.IntRange(1, 1 << 40), default=2000, show_default=True, help="Prompt length.")
@click.option("--protocol", type=click.Choice(sorted(TABLE)), default="rdma", show_default=True, help="How it travels.")
@click.option("--gbps", type=click.FloatRange(0, min_open=True), help="Bandwidth in Gbit/s; else the usual one.")
@click.option("--dtype", type=click.Choice(sorted(DTYPE_BYTES)), help="Of the cache; else that of the weights.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def estimate(model: str, tokens: int, protocol: str, gbps: float | None, dtype: str | None, as_json: bool) -> None:
    """KV bytes per token of a model, and how long a prompt's KV takes to move.

    A calculation from the table of `kvstore/transport/estimator.py`; running workers learn their links' real figures,
    see celeriac_worker_events_total{event="kv_link_..."} in /metrics.
    """
    config = _read_config(model)
    try:
        shape = kv_shape(config, dtype=dtype)
    except KVShapeError as error:
        raise UsageProblem(f"--model {model}: {error}") from error
    kind = TABLE[protocol]
    bytes_per_s = gbps * 1e9 / 8 if gbps else table_figures(protocol).bytes_per_s
    num_bytes = tokens * shape.bytes_per_token
    wire_ms = num_bytes / bytes_per_s * 1e3
    base_ms = (kind.base_low_s * 1e3, kind.base_high_s * 1e3)
    found: dict[str, Any] = {
        "model": model,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "dtype": shape.dtype,
        "kv_bytes_per_token": shape.bytes_per_token,
        "tokens": tokens,
        "kv_bytes": num_bytes,
        "protocol": protocol,
        "gbps": round(bytes_per_s * 8 / 1e9, 3),
        "wire_ms": round(wire_ms, 3),
        "base_ms": [round(ms, 3) for ms in base_ms],
        "total_ms": [round(wire_ms + ms, 3) for ms in base_ms],
    }
    if as_json:
        click.echo(json.dumps(found))
        return
    parts = "keys and values" if shape.num_tensors == 2 else "one latent"
    click.echo(
        f"KV per token   {_size(shape.bytes_per_token)} ({shape.bytes_per_token} bytes: {shape.num_layers} layers x "
        f"{shape.num_kv_heads} KV heads x {shape.head_dim}, {parts}, {shape.dtype})"
    )
    click.echo(f"{tokens} tokens    {_size(num_bytes)}")
    click.echo(f"link           {protocol}, {found['gbps']:g} Gbit/s, base latency {_span(base_ms)} ms")
    click.echo(f"transfer       {wire_ms:.4g} ms on the wire, {_span(found['total_ms'])} ms in all")


def _read_config(model: str) -> dict[str, Any]:
    """A folder's config.json, the file itself, or that one file of a hub repository."""
    path = Path(model).expanduser()
    try:
        if path.is_dir():
            path = path / "config.json"
        elif not path.is_file():
            path = _from_hub(model)
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageProblem(f"--model {model}: {path} cannot be read: {error}. Expected a config.json.") from error
    if not isinstance(config, dict):
        raise UsageProblem(f"--model {model}: {path} holds no JSON object. Expected a config.json.")
    return config


def _from_hub(model: str) -> Path:
    from engines.models.source import ModelSourceError, download_config  # the hub client, only where it is needed

    try:
        return download_config(model)
    except ModelSourceError as error:
        raise UsageProblem(str(error)) from error


def _size(num_bytes: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.3g} {unit}"
    return f"{num_bytes} B"


def _span(values: Any) -> str:
    low, high = values
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
