"""Fuzzes the frame parser and the receiver behind it: `python -m tests.fuzz --runs 1000000`, or `--seconds 30`.

Begins with frames as nodes send them, whole, cut, and after one another. Exit 1: an input broke a promise; it is
printed, and lies under `--keep` when that is given.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from kvstore.transport.frames import (
    Commit,
    DataHeader,
    FenceBody,
    FrameType,
    Renew,
    Reserve,
    data_frame,
    frame,
)
from kvstore.transport.handshake import WriterHandshake

ROOT = Path(__file__).parents[2]
PAGE = b"p" * 64


def seeds() -> dict[str, bytes]:
    """Inputs of `tests.fuzz.target`: the stage, then bytes of a real writer."""
    hello = frame(
        FrameType.HELLO,
        WriterHandshake(
            secrets=[b"the cluster secret"], incarnation="w", target="reader", compat="compat", protocol="tcp"
        ).hello,
    )
    reserve = frame(FrameType.RESERVE, Reserve("y", "rid", 5, "tok", 2))
    pages = [
        data_frame(DataHeader(1, 5, place, 1, layer, layer + 1), len(PAGE)) + PAGE
        for place in range(2)
        for layer in range(2)
    ]
    commit = frame(FrameType.COMMIT, Commit("x", "reader.1", 5, 40, 2, 7, b"state", 256, 0.1))
    renew = frame(FrameType.RENEW, Renew(["x", "y"]))
    done = [frame(kind, FenceBody("x", "reader.1")) for kind in (FrameType.ABORT, FrameType.FENCED)]
    beat = frame(FrameType.HEARTBEAT)
    inputs = {
        "hello": b"\x00" + hello,
        "hello-twice": b"\x00" + hello * 2,
        "beat": b"\x00" + beat,
        "reserve": b"\x01" + reserve + renew + beat,
        "pages": b"\x02" + b"".join(pages) + commit,
        "half": b"\x02" + pages[0] + commit,
        "cut": b"\x02" + pages[0][:-9],
        "commit-first": b"\x02" + commit + pages[0],
    }
    inputs |= {f"done-{number}": b"\x02" + pages[0] + end + pages[1] for number, end in enumerate(done)}
    return inputs


def fuzz(*, runs: int = 0, seconds: int = 0, seed: int = 0, keep: str = "") -> int:
    """Number of executions.

    Raises:
        AssertionError: an input broke a promise.
    """
    with tempfile.TemporaryDirectory(prefix="celeriac-fuzz-") as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for name, data in seeds().items():
            (corpus / name).write_bytes(data)
        # libFuzzer asks for the peak of its memory, which begins at that of the process that has started it.
        limit_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024 + 1024
        command = [
            sys.executable, "-m", "tests.fuzz.target", str(corpus), f"-artifact_prefix={keep or folder}/",
            "-timeout=10", f"-rss_limit_mb={limit_mb}", "-max_len=4096", "-print_final_stats=1", f"-seed={seed}",
            f"-runs={runs or -1}", f"-max_total_time={seconds}",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds + 60 + runs / 500
        )
    executed = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    assert done.returncode == 0 and executed, (
        f"the fuzzer ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    )
    return int(executed[1])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz the KV receiver.")
    parser.add_argument("--runs", type=int, default=0, help="executions; 0: as many as the seconds allow")
    parser.add_argument("--seconds", type=int, default=0, help="0: as long as the executions take")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--keep", default="", help="folder for inputs that break something")
    given = parser.parse_args()
    if not given.runs and not given.seconds:
        parser.error("give --runs or --seconds")
    if importlib.util.find_spec("atheris") is None:
        print("skipped: atheris is not installed (it has wheels for Linux on x86-64)")
        return 0
    try:
        count = fuzz(runs=given.runs, seconds=given.seconds, seed=given.seed, keep=given.keep)
    except AssertionError as error:
        print(error)
        return 1
    print(f"{count} executions, no promise broken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
