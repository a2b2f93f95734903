"""Names that gateway, worker and supervisor must agree on: queues, tasks, task ids, incarnations, tokens."""

from __future__ import annotations

import os
from typing import Final

PREFILL_TASK: Final = "celeriac.prefill"
DECODE_TASK: Final = "celeriac.decode"
GENERATE_TASK: Final = "celeriac.generate"
TASK_OF_STAGE: Final = {"prefill": PREFILL_TASK, "decode": DECODE_TASK, "generate": GENERATE_TASK}


def prefill_queue(model: str) -> str:
    return f"prefill.{model}"


def generate_queue(model: str) -> str:
    return f"generate.{model}"


def decode_queue(model: str, node: str) -> str:
    """A decode worker's own queue: the KV is there, so nobody else could take the message."""
    return f"decode.{model}.{node}"


def task_id(rid: str, stage: str, wake_n: int) -> str:
    """Never used twice: Celery remembers finished and revoked ids for hours, and swallows them."""
    return f"{rid}.{stage}.{wake_n}"


def decode_stage(attempt: int) -> str:
    """Stage of the decode task of a request's `attempt`th grant, from 1."""
    return "decode" if attempt <= 1 else f"decode-{attempt}"


class Identity:
    """Who this worker is to the state server. Owned by the output thread once it runs.

    An incarnation is one life of the engine; a new engine makes a new one, and every later token carries it.
    """

    def __init__(self, node: str) -> None:
        self.node = node
        self.incarnation = ""
        self._counter = 0
        self.renew()

    def renew(self) -> str:
        """Begin a new life. Returns the incarnation that ended ("" the first time)."""
        former, self.incarnation, self._counter = self.incarnation, f"{self.node}-{os.urandom(4).hex()}", 0
        return former

    def next_token(self) -> str:
        """An owner token, never used twice."""
        self._counter += 1
        return f"{self.incarnation}.{self._counter}"
