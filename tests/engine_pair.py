"""Two real engines in the test's own process, joined by a real transport; the test plays both fronts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import configs
from engines.build import Engine, build_engine
from engines.messages import (
    Add,
    Arrived,
    Drop,
    EngineMessage,
    Kept,
    Lease,
    PrefixHint,
    Promote,
    Target,
    TokenOut,
    Tokens,
)
from engines.params import SamplingParams
from engines.process import EngineConfig
from kvstore.readable import wait_readable

SECRET = b"a secret for tests, of thirty-two bytes"


@dataclass
class Half:
    """One engine and what it told its front."""

    engine: Engine
    said: list[EngineMessage]
    tokens: dict[tuple[str, int], dict[int, int]] = field(default_factory=dict)
    finished: dict[tuple[str, int], str] = field(default_factory=dict)

    def take(self) -> list[EngineMessage]:
        """What it said since the last look; tokens are sorted in."""
        fresh, self.said[:] = list(self.said), []
        for message in fresh:
            if isinstance(message, Tokens):
                for out in message.outs:
                    self._put(out)
        return fresh

    def _put(self, out: TokenOut) -> None:
        self.tokens.setdefault((out.rid, out.c), {}).update(enumerate(out.token_ids, out.index))
        if out.finish:
            self.finished[out.rid, out.c] = out.finish


class EnginePair:
    """`prefill` and `decode`, stepped in turn. `on_arrived` may refuse by returning False."""

    def __init__(
        self,
        run_dir: Path,
        model: Path,
        *,
        protocol: str = "shm",
        decode_blocks: int = 0,
        flags: Mapping[str, str] | None = None,
        decode_flags: Mapping[str, str] | None = None,
        more: tuple[str, ...] = (),
    ) -> None:
        """`flags`: settings of all engines, as on a command line; `decode_flags`: of decode engines. `more`: such as
        "prefill2", stepped with the two.
        """
        self._flags = dict(flags or {})
        self._decode_flags = dict(decode_flags or {})
        self.halves = {
            name: self._build(name, run_dir, model, protocol, decode_blocks) for name in ("prefill", "decode", *more)
        }
        self.prefill, self.decode = self.halves["prefill"], self.halves["decode"]
        self.target = Target("d", self.decode.engine.address)
        self.on_arrived: Callable[[Arrived], bool] = lambda _: True
        self._handed: set[str] = set()  # a link that was lost before HANDED came brings its request again
        self.kept: list[tuple[bytes, int]] = []  # what the prefill engines said that they keep
        self._lease_s = 0.0

    def _build(self, name: str, run_dir: Path, model: Path, protocol: str, decode_blocks: int) -> Half:
        flags = {
            "model.path": str(model),
            "model.dtype": "float32",
            "transfer.protocol": protocol,
            "kv.memory_bytes": "64MiB",
            "run_dir": str(run_dir),
            **self._flags,
        }
        role = name.rstrip("0123456789")
        settings = configs.load(env={}, flags={**flags, **(self._decode_flags if role == "decode" else {})})
        if role == "decode" and decode_blocks:
            settings.kv.num_blocks = decode_blocks
        said: list[EngineMessage] = []
        config = EngineConfig(settings=settings, role=role, node=name, incarnation=f"{name}-1", secret=SECRET)
        return Half(build_engine(config, said.append), said)

    def close(self) -> None:
        for half in self.halves.values():
            half.engine.close()

    def add(
        self,
        rid: str,
        prompt_ids: list[int],
        choices: list[list[int]] | None = None,
        *,
        to: str = "prefill",
        mode: Literal["push", "local"] = "push",
        prefix: PrefixHint | None = None,
        **params: object,
    ) -> None:
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 16, **params})  # type: ignore[arg-type]
        self._handed.discard(rid)
        self.halves[to].engine.core.handle(
            Add(
                rid=rid,
                epoch=2,
                token=f"p.{rid}",
                mode=mode,
                prompt_ids=prompt_ids,
                choices=choices or [[] for _ in range(sampling.n)],
                params=sampling,
                seed=7,
                targets=[self.target],
                prefix=prefix,
            )
        )

    def run(self, until: Callable[[], bool], timeout_s: float = 30.0) -> None:
        end = time.monotonic() + timeout_s
        while not until():
            assert time.monotonic() < end, "the engines did not get there in time"
            self.turn()

    def turn(self) -> None:
        now = time.monotonic()
        is_lease_due = now - self._lease_s > 0.5
        for half in self.halves.values():
            if is_lease_due:
                half.engine.core.handle(Lease())
                self._lease_s = now
            for event in half.engine.node.poll_events():
                half.engine.core.handle_kv(event)
            half.engine.core.step()
        for name, half in self.halves.items():
            if name.startswith("prefill"):
                self.kept += [mark for said in half.take() if isinstance(said, Kept) for mark in said.marks]
        for message in self.decode.take():
            if not isinstance(message, Arrived) or not self.on_arrived(message):
                continue
            if message.rid in self._handed:  # as `handoff` would say: it is decoded here already
                self.decode.engine.core.handle(Drop(message.rid, message.xfer))
                continue
            self._handed.add(message.rid)
            self.decode.engine.core.handle(Promote(message.rid, message.xfer, message.epoch + 1, "d.1"))
        wait_readable([half.engine.node.wake_fd for half in self.halves.values()], 0.001)

    def output(self, rid: str, c: int = 0) -> list[int]:
        """Tokens of a choice in their order, whichever engine told them."""
        told: dict[int, int] = {}
        for half in self.halves.values():
            told |= half.tokens.get((rid, c), {})
        return [token_id for _, token_id in sorted(told.items())]

    def blocks_in_use(self) -> dict[str, int]:
        """Of both engines, by state; empty when all are free or cached."""
        used: dict[str, int] = {}
        for half in self.halves.values():
            for state, count in half.engine.core.stats().blocks.items():
                if count and state not in ("free", "cached"):
                    used[state] = used.get(state, 0) + count
        return used
