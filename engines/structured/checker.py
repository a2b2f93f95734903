"""Checks constraints for the gateway: in child processes with limits, with the verdicts remembered.

Children start at the first constraint (a gateway without structured outputs has none) and are started anew after one
was ended by its limits. `check` blocks its caller, a thread that serves one call; nobody else waits.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Final

import msgspec

from engines.structured.checker_main import CPU_LIMIT_S, HEADER, Verdict
from engines.structured.constraint import Constraint
from engines.structured.errors import BadConstraint, CheckerBusy

NUM_CHILDREN: Final = 2
START_S: Final = 30.0
REPLY_S: Final = 5 * CPU_LIMIT_S  # the child's own limit is CPU time; this one is for a host that gives it none
QUEUE_S: Final = 15.0
MAX_REMEMBERED: Final = 512
_LIMITS: Final = f"compiling it needs more than {CPU_LIMIT_S:g} s or too much memory; use a simpler one"
TOO_COMPLEX: Final = Verdict("schema_too_complex", _LIMITS)


class ConstraintChecker:
    """Thread-safe. The children die with this process: their stdin ends.

    Args:
        tokenizer_json, vocab_size, eos_token_ids: of the model, as `engines.structured.grammar.Vocabulary`.
    """

    def __init__(self, tokenizer_json: Path, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        arguments = [str(tokenizer_json), str(vocab_size), ",".join(map(str, eos_token_ids))]
        self._command = [sys.executable, "-m", "engines.structured.checker_main", *arguments]
        self._idle: queue.Queue[_Child | None] = queue.Queue()
        for _ in range(NUM_CHILDREN):
            self._idle.put(None)  # a place for a child that is not running yet
        self._lock = threading.Lock()
        self._remembered: OrderedDict[Constraint, Verdict] = OrderedDict()

    def check(self, constraint: Constraint) -> None:
        """Blocks until the verdict: milliseconds for a schema of a usual size, at most some seconds.

        Raises:
            BadConstraint: it cannot be served.
            CheckerBusy: too many others are waiting.
        """
        with self._lock:
            verdict = self._remembered.get(constraint)
        if verdict is None:
            verdict = self._ask_a_child(constraint)
            with self._lock:
                self._remembered[constraint] = verdict
                if len(self._remembered) > MAX_REMEMBERED:
                    self._remembered.popitem(last=False)
        if verdict.code:
            raise BadConstraint(verdict.code, verdict.message, pointer=verdict.pointer)

    def close(self) -> None:
        """Ends idle children now."""
        for _ in range(NUM_CHILDREN):
            with contextlib.suppress(queue.Empty):
                child = self._idle.get_nowait()
                if child is not None:
                    child.end()
                self._idle.put(None)

    def _ask_a_child(self, constraint: Constraint) -> Verdict:
        try:
            child = self._idle.get(timeout=QUEUE_S)
        except queue.Empty:
            raise CheckerBusy(waited_s=QUEUE_S) from None
        try:
            if child is None:
                child = _Child(self._command)
            verdict = child.ask(constraint)
            if verdict is None:
                child.end()
                child = None
                verdict = TOO_COMPLEX
            return verdict
        finally:
            self._idle.put(child)


class _Child:
    """One checker process, used by one thread at a time."""

    def __init__(self, command: list[str]) -> None:
        # One thread, few arenas: the child is limited in address space, of which hosts with many cores reserve a lot.
        env = {**os.environ, "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=env)
        self._wait_s = START_S

    def ask(self, constraint: Constraint) -> Verdict | None:
        """The verdict, or None if the child ended or has to be ended."""
        assert self._process.stdin is not None
        body = msgspec.msgpack.encode(constraint)
        end_s = time.monotonic() + self._wait_s
        try:
            self._process.stdin.write(HEADER.pack(len(body)) + body)
        except OSError:
            return None
        head = self._read(HEADER.size, end_s)
        reply = None if head is None else self._read(HEADER.unpack(head)[0], end_s)
        self._wait_s = REPLY_S
        return None if reply is None else msgspec.msgpack.decode(reply, type=Verdict)

    def end(self) -> None:
        self._process.kill()
        self._process.wait(5)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, num_bytes: int, end_s: float) -> bytes | None:
        assert self._process.stdout is not None
        parts = b""
        poller = select.poll()  # a gateway has more descriptors than `select` can name
        poller.register(self._process.stdout, select.POLLIN)
        while len(parts) < num_bytes:
            if not poller.poll(max(0.0, end_s - time.monotonic()) * 1e3):
                return None
            part = self._process.stdout.read(num_bytes - len(parts))
            if not part:
                return None
            parts += part
        return parts
