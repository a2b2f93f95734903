"""python -m tests.thousand [--prompts 1000] [--seed 0] [--way NAME]: every way's tokens against one engine's."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

import click

from tests.thousand.prompts import make_prompts
from tests.thousand.ways import WAYS, disaggregated, monolithic

SHOWN = ("kv_arrived_bytes", "prefix_hit_tokens", "prefix_kept_blocks", "prefix_fetches", "tier_restored_blocks")


@click.command()
@click.option("--prompts", "count", default=1000, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--way", "names", multiple=True, type=click.Choice([way.name for way in WAYS]), help="Only these.")
@click.option("--json", "as_json", is_flag=True)
def main(count: int, seed: int, names: tuple[str, ...], as_json: bool) -> None:
    """Exit 1 if any token differs."""
    prompts = make_prompts(count, seed)
    with tempfile.TemporaryDirectory(prefix="celeriac-thousand-") as folder:
        expected = monolithic(Path(folder), prompts)
    rows = []
    for way in WAYS:
        if names and way.name not in names:
            continue
        started_s = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="celeriac-thousand-") as folder:
            answers, counters = disaggregated(way, Path(folder), prompts)
        num_equal = sum(a == b for a, b in zip(answers, expected, strict=True))
        row = {"way": way.name, "prompts": count, "equal": num_equal, "seconds": round(time.monotonic() - started_s, 1)}
        row |= {name: counters.get(name, 0.0) for name in SHOWN}
        rows.append(row)
        if not as_json:
            facts = ", ".join(f"{name} {row[name]:.0f}" for name in SHOWN)
            print(f"{way.name}: {num_equal} of {count} equal in {row['seconds']} s; {facts}", flush=True)
    if as_json:
        print(json.dumps(rows))
    sys.exit(any(row["equal"] != count for row in rows))


if __name__ == "__main__":
    main()
