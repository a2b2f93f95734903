"""Storms from the command line.

python -m tests.protocol.run                        1,000 storms, seeds 0..999: what happened, first violations
python -m tests.protocol.run --storms 20000 --first 5000
python -m tests.protocol.run --seed 42 --trace      one storm, every call and message printed
python -m tests.protocol.run --real                 the calls go to the real functions on a server of their own
python -m tests.protocol.run --mutate no_grace      one rule broken (kernel.MUTATIONS; a+b breaks two)
python -m tests.protocol.run --mutations            each mutation in turn: which invariant catches it
python -m tests.protocol.run --kind backlog         500 requests at once; or another of backlog.KINDS
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import partial

from kvstore.state import EmbeddedValkey
from tests.protocol.backlog import KINDS
from tests.protocol.kernel import MUTATIONS, Violation
from tests.protocol.memory_redis import MemoryRedis
from tests.protocol.real_redis import RealRedis


class Totals:
    """What many storms brought: violations by invariant, the first text of each, summed statistics."""

    def __init__(self):
        self.num_storms, self.found, self.texts, self.stats = 0, Counter(), {}, Counter()
        self.samples, self.longest = defaultdict(list), Counter()

    def add(self, storm):
        """Plays one storm to its end."""
        self.num_storms += 1
        try:
            storm.play()
        except Violation as violation:
            name = str(violation).split(":")[0]
            self.found[name] += 1
            self.texts.setdefault(name, str(violation))
        for name, value in storm.stats.items():
            if name.endswith(", s"):
                self.longest[name] = round(max(self.longest[name], value), 2)
            else:
                self.stats[name] += value
        for name, values in storm.samples.items():
            self.samples[name] += values

    def lines(self):
        """The report, for people."""
        yield f"{self.num_storms} storms; violations: {dict(self.found) or 'none'}"
        yield from self.texts.values()
        yield str(dict(sorted(self.stats.items())))
        yield f"longest: {dict(self.longest)}"
        for name, values in sorted(self.samples.items()):
            values = sorted(values)
            half, most = values[len(values) // 2], values[int(len(values) * 0.95)]
            yield f"{name}: n {len(values)}, p50 {half:.3f}, p95 {most:.3f}, max {values[-1]:.3f}"


def run_storms(first, count, *, mutate=None, stop_at=None, seconds=None, kind="storm", make_redis=MemoryRedis):
    """Storms with seeds from `first` on: `count` of them, less after `stop_at` violations or `seconds`."""
    totals, began = Totals(), time.monotonic()
    for seed in range(first, first + count):
        totals.add(KINDS[kind](seed, mutate, make_redis=make_redis))
        if stop_at and totals.found.total() >= stop_at:
            break
        if seconds and time.monotonic() - began > seconds:
            break
    return totals


@contextmanager
def redis_maker(*, real):
    """A maker of state servers for storms: in memory, or the real functions on an embedded server."""
    if not real:
        yield MemoryRedis
        return
    with tempfile.TemporaryDirectory() as run_dir:
        server = EmbeddedValkey(run_dir, appendonly=False)
        try:
            yield partial(RealRedis, url=server.start())
        finally:
            server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storms", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--mutate", help="one of MUTATIONS, or several joined by +")
    parser.add_argument("--mutations", action="store_true")
    parser.add_argument("--kind", default="storm", choices=list(KINDS))
    parser.add_argument("--seconds", type=float, help="time limit of a run (of each mutation)")
    args = parser.parse_args()
    if args.mutate and not set(args.mutate.split("+")) <= set(MUTATIONS):
        parser.error(f"--mutate takes {', '.join(MUTATIONS)}")
    with redis_maker(real=args.real) as make_redis:
        if args.seed is not None:
            print(dict(KINDS[args.kind](args.seed, args.mutate, args.trace, make_redis).play()))
            return 0
        names = MUTATIONS if args.mutations else [args.mutate]
        for name in names:
            totals = run_storms(
                args.first,
                args.storms,
                mutate=name,
                stop_at=20 if args.mutations else None,
                seconds=args.seconds,
                kind=args.kind,
                make_redis=make_redis,
            )
            if args.mutations:
                print(f"{name:20} {totals.num_storms:6} storms  {dict(totals.found) or 'not caught'}", flush=True)
            else:
                print("\n   ".join(totals.lines()))
    return 1 if totals.found and not args.mutations else 0


if __name__ == "__main__":
    sys.exit(main())
