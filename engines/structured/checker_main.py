"""The child process that compiles constraints for the gateway, only to learn whether they can be compiled.

    stdin: length, Constraint        stdout: length, Verdict

A process, because nothing else bounds a compiler: past its seconds of CPU time the kernel ends it, past its memory the
allocator does, and the parent reads the end of the pipe as "too complex". It leaves at the end of stdin.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

import msgspec

from engines.structured.constraint import Constraint
from engines.structured.errors import BadConstraint

HEADER = struct.Struct("<I")
CPU_LIMIT_S = 2.0
MEMORY_LIMIT_BYTES = 2 << 30


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """What is wrong; `code` is "" if nothing is."""

    code: str = ""
    message: str = ""
    pointer: str = ""


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next frame, or None at the end of the stream."""
    head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        return None
    body = stream.read(HEADER.unpack(head)[0])
    return body if len(body) == HEADER.unpack(head)[0] else None


def write_frame(stream: BinaryIO, body: bytes) -> None:
    stream.write(HEADER.pack(len(body)) + body)
    stream.flush()


def main() -> None:
    """`python -m engines.structured.checker_main <tokenizer.json> <vocabulary size> <end ids with commas>`"""
    from engines.structured.grammar import Vocabulary, build_tokenizer, compile_constraint

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the gateway's business; our stdin ends then
    eos_ids = tuple(int(token_id) for token_id in sys.argv[3].split(",") if token_id)
    broken: BadConstraint | None = None
    try:
        tokenizer = build_tokenizer(Vocabulary(Path(sys.argv[1]), int(sys.argv[2]), eos_ids))
    except BadConstraint as error:
        broken = error
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while (body := read_frame(sys.stdin.buffer)) is not None:
        # The default action of SIGPROF ends the process, also in the midst of a call that never returns to Python.
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
        try:
            if broken is not None:
                raise broken
            compile_constraint(msgspec.msgpack.decode(body, type=Constraint), tokenizer)
            verdict = Verdict()
        except BadConstraint as error:
            verdict = Verdict(error.code, error.message, error.pointer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(sys.stdout.buffer, msgspec.msgpack.encode(verdict))


if __name__ == "__main__":
    main()
