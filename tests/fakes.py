"""Small real classes that stand in for what a test must not need: an engine process without a model.

`FakeEngine` speaks `engines.messages` over a socketpair, as the real engine process does, and hands sequences over
through a unix socket. Its tokens are a pure function of the ids before them, so that a recovered sequence must go on
exactly as the undisturbed one would.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec

from configs.schema import Settings
from engines import messages
from engines.finish import FinishRule
from engines.messages import EngineMessage, FrameReader, TokenOut, frame
from engines.params import SamplingParams
from kvstore.address import KVAddress
from kvstore.errors import StateError, StateUnavailable
from kvstore.readable import wait_readable
from kvstore.state.records import ClaimItem, HandoffItem, SpansItem

FIRST_ID, NUM_IDS = 300, 200  # ordinary words of tiny-chat's vocabulary, no end token among them
MAX_MODEL_LEN = 2048


def fake_token(prompt_ids: Sequence[int], output_ids: Sequence[int], choice: int = 0) -> int:
    """The token after these."""
    mixed = 7 * len(prompt_ids) + 31 * sum(prompt_ids) + 131 * len(output_ids) + 17 * sum(output_ids) + 1009 * choice
    return FIRST_ID + mixed % NUM_IDS


def fake_output(prompt_ids: Sequence[int], num_tokens: int, choice: int = 0) -> list[int]:
    """What an undisturbed run gives."""
    ids: list[int] = []
    for _ in range(num_tokens):
        ids.append(fake_token(prompt_ids, ids, choice))
    return ids


class FakeHandoff(msgspec.Struct):
    """What goes from one fake engine to another instead of KV."""

    rid: str
    xfer: str
    epoch: int
    token: str
    prompt_ids: list[int]
    choices: list[list[int]]
    params: SamplingParams
    seed: int
    deadline_s: float


@dataclass
class FakeSequences:
    """One request in the fake engine."""

    rid: str
    prompt_ids: list[int]
    choices: list[list[int]]
    params: SamplingParams
    epoch: int
    done: set[int] = field(default_factory=set)


class FakeEngine(threading.Thread):
    """Owned by its own thread. `step_s` is the pace; `kill()` is its death."""

    def __init__(self, sock: socket.socket, *, incarnation: str, run_dir: Path, step_s: float = 0.005) -> None:
        super().__init__(name="fake-engine", daemon=True)
        self._sock = sock
        self._reader = FrameReader()
        self._step_s = step_s
        self._rule = FinishRule(frozenset(), MAX_MODEL_LEN)
        self._decoding: dict[str, FakeSequences] = {}
        self._adds: dict[str, messages.Add] = {}
        self._arrivals: dict[str, tuple[FakeHandoff, socket.socket]] = {}
        self._writers: dict[str, tuple[socket.socket, str]] = {}  # xfer -> connection, rid
        self._peers: list[messages.Target] = []
        self._counter = 0
        self._incarnation = incarnation
        self._stats_s = 0.0
        self._is_killed = False
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = str(run_dir / f"{incarnation.rsplit('-', 1)[1]}.sock")
        self._listener.bind(path)
        self._listener.listen()
        self._address = KVAddress(incarnation=incarnation, host_id="fake", unix_path=path, compat="fake")

    def kill(self) -> None:
        """As kill -9: nothing more is said, every socket is closed by the kernel."""
        self._is_killed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.join(2)

    def run(self) -> None:
        self._send(
            messages.Ready(
                pid=os.getpid(),
                address=self._address,
                num_blocks=100,
                block_size=16,
                max_model_len=MAX_MODEL_LEN,
                dtype="float32",
                device="fake",
                visible_device=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
                num_threads=1,
                load_s=0.0,
            )
        )
        try:
            while not self._is_killed:
                self._wait()
                self._step()
        except (OSError, EOFError):
            pass
        finally:
            connections = [c for _, c in self._arrivals.values()] + [c for c, _ in self._writers.values()]
            for sock in (self._sock, self._listener, *connections):
                sock.close()

    def _wait(self) -> None:
        sources = [self._sock, self._listener, *(sock for sock, _ in self._writers.values())]
        has_work = bool(self._decoding or self._adds)
        readable = wait_readable(sources, self._step_s if has_work else 0.05)
        for source in readable:
            if source is self._sock:
                chunk = self._sock.recv(1 << 20)
                if not chunk:
                    raise EOFError
                for body in self._reader.feed(chunk):
                    self._handle(messages.decode_front(body))
            elif source is self._listener:
                self._take_arrival(self._listener.accept()[0])
            else:
                self._take_answer(source)

    def _send(self, message: EngineMessage) -> None:
        self._sock.sendall(frame(message))

    # ---------------------------------------------------------------- messages of the front
    def _handle(self, message: messages.FrontMessage) -> None:
        match message:
            case messages.Add():
                self._adds[message.rid] = message
            case messages.Peers(targets):
                self._peers = targets
            case messages.Promote(rid, xfer):
                handoff, connection = self._arrivals.pop(xfer)
                connection.sendall(b"H")
                connection.close()
                self._decoding[rid] = FakeSequences(
                    rid, handoff.prompt_ids, handoff.choices, handoff.params, message.epoch
                )
            case messages.Drop(rid, xfer):
                for key, (handoff, connection) in list(self._arrivals.items()):
                    if key == xfer or (not xfer and handoff.rid == rid):
                        connection.sendall(b"R")
                        connection.close()
                        del self._arrivals[key]
                if not xfer:
                    self._decoding.pop(rid, None)
                    self._adds.pop(rid, None)
            case messages.Stop(rid, c):
                if rid in self._decoding:
                    self._decoding[rid].done.add(c)
            case messages.Shutdown():
                raise EOFError

    # ---------------------------------------------------------------- hand-off between two fakes
    def _push(self, add: messages.Add, choices: list[list[int]]) -> None:
        target = (self._peers or add.targets)[0]
        self._counter += 1
        xfer = f"{self._incarnation}:{self._counter}"
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(target.address.unix_path)
        except OSError as error:
            self._send(messages.Pushed(rid=add.rid, xfer=xfer, outcome="failed", reason=str(error)))
            return
        self._send(messages.Granted(add.rid, xfer, target.node, 1))
        handoff = FakeHandoff(
            add.rid, xfer, add.epoch, add.token, add.prompt_ids, choices, add.params, add.seed, add.deadline_s
        )
        body = msgspec.msgpack.encode(handoff)
        connection.sendall(messages.FRAME_HEADER.pack(len(body)) + body)
        self._writers[xfer] = (connection, add.rid)

    def _take_arrival(self, connection: socket.socket) -> None:
        connection.settimeout(2)
        reader, bodies = FrameReader(), []
        while not bodies:
            chunk = connection.recv(1 << 20)
            if not chunk:
                return
            bodies = reader.feed(chunk)
        handoff = msgspec.msgpack.decode(bodies[0], type=FakeHandoff)
        self._arrivals[handoff.xfer] = (handoff, connection)
        self._send(messages.Incoming(handoff.rid, handoff.xfer))
        self._send(
            messages.Arrived(
                rid=handoff.rid,
                xfer=handoff.xfer,
                epoch=handoff.epoch,
                from_token=handoff.token,
                prompt_ids=handoff.prompt_ids,
                choices=handoff.choices,
                params=handoff.params,
                seed=handoff.seed,
                deadline_s=handoff.deadline_s,
                num_bytes=1,
                transfer_s=0.0,
            )
        )

    def _take_answer(self, source: socket.socket) -> None:
        xfer = next(key for key, (sock, _) in self._writers.items() if sock is source)
        try:
            answer = source.recv(1)
        except OSError:
            answer = b""
        source.close()
        _, rid = self._writers.pop(xfer)
        outcome: Any = {b"H": "handed", b"R": "refused"}.get(answer, "failed")
        self._send(messages.Pushed(rid=rid, xfer=xfer, outcome=outcome))

    # ---------------------------------------------------------------- steps
    def _step(self) -> None:
        now = time.monotonic()
        if now - self._stats_s > 0.5:
            self._stats_s = now
            used = len(self._decoding)
            self._send(
                messages.Stats(blocks={"free": 100 - used, "used": used}, live=used, waiting=len(self._adds), step_ms=1)
            )
        outs = [out for sequences in list(self._decoding.values()) for out in self._advance(sequences)]
        adds, self._adds = self._adds, {}
        for add in adds.values():
            outs += self._prefill(add)
        if outs:
            self._send(messages.Tokens(0, outs))

    def _prefill(self, add: messages.Add) -> list[TokenOut]:
        sequences = FakeSequences(add.rid, add.prompt_ids, [list(ids) for ids in add.choices], add.params, add.epoch)
        outs = self._advance(sequences)
        if add.mode == "local":
            self._decoding[add.rid] = sequences
        elif len(sequences.done) < len(sequences.choices):
            self._push(add, sequences.choices)
        return outs  # all finished at prefill: the tokens say so, nothing is handed over

    def _advance(self, sequences: FakeSequences) -> list[TokenOut]:
        outs = []
        for c, ids in enumerate(sequences.choices):
            finish = self._rule.check(sequences.params, len(sequences.prompt_ids), ids)
            if c in sequences.done:
                continue
            new: list[int] = []
            if finish is None:
                new = [fake_token(sequences.prompt_ids, ids, c)]
                ids += new
                finish = self._rule.check(sequences.params, len(sequences.prompt_ids), ids)
            if finish is not None:
                sequences.done.add(c)
            reason = finish.reason if finish else ""
            outs.append(TokenOut(sequences.rid, c, len(ids) - len(new), new, None, reason, epoch=sequences.epoch))
        if len(sequences.done) == len(sequences.choices):
            self._decoding.pop(sequences.rid, None)
        return outs


@dataclass
class FakeChild:
    """What `spawn_engine` returns, with a thread instead of a process behind it."""

    engine: FakeEngine
    sock: socket.socket
    pid: int = 0

    def poll(self) -> int | None:
        return None if self.engine.is_alive() else 0

    def wait(self, timeout: float | None = None) -> int:
        self.engine.join(timeout)
        if self.engine.is_alive():
            raise TimeoutError
        return 0

    def terminate(self) -> None:
        self.engine.kill()

    def kill(self) -> None:
        self.engine.kill()


def fake_spawner(run_dir: Path, *, step_s: float, on_spawn: Callable[[FakeEngine], None]) -> Callable[..., FakeChild]:
    """Stands in for `engines.process.spawn_engine`."""

    def spawn(settings: Settings, *, incarnation: str, **_: Any) -> FakeChild:  # noqa: ARG001
        ours, theirs = socket.socketpair()
        engine = FakeEngine(theirs, incarnation=incarnation, run_dir=run_dir, step_s=step_s)
        engine.start()
        on_spawn(engine)
        return FakeChild(engine, ours)

    return spawn


def run_worker_program() -> None:
    """A real Celery worker with a fake engine; for `python -c`. SIGUSR2 kills the engine.

    Environment: FAKE_SETTINGS (msgpack in hex), FAKE_STEP_S, FAKE_RUN_DIR; the arguments are those of `celery worker`.
    """
    import signal
    import sys

    import configs

    settings = msgspec.msgpack.decode(bytes.fromhex(os.environ["FAKE_SETTINGS"]), type=Settings)
    vars(configs).update(load=lambda: settings, secret=lambda _: b"secret")
    from tasks import pool

    engines: list[FakeEngine] = []
    spawn = fake_spawner(
        Path(os.environ["FAKE_RUN_DIR"]), step_s=float(os.environ["FAKE_STEP_S"]), on_spawn=engines.append
    )
    vars(pool)["spawn_engine"] = spawn
    signal.signal(signal.SIGUSR2, lambda *_: engines[-1].kill())
    from tasks.app import app

    app.worker_main(["worker", *sys.argv[1:]])


class RecordingJob:
    """A Celery task that remembers what it was told."""

    def __init__(self, rid: str, stage: str = "prefill") -> None:
        self.id, self.rid, self.stage = f"{rid}.{stage}.1", rid, stage
        self.told: list[tuple[str, Any]] = []

    def accept(self, started_s: float) -> None:
        self.told.append(("accept", started_s))

    def succeed(self, outcome: str) -> None:
        self.told.append(("succeed", outcome))

    def retry(self, reason: str) -> None:
        self.told.append(("retry", reason))

    def fail(self, error: Exception) -> None:
        self.told.append(("fail", error))

    def revoke(self, reason: str) -> None:
        self.told.append(("revoke", reason))

    def requeue(self) -> None:
        self.told.append(("requeue", None))

    @property
    def words(self) -> list[str]:
        return [word for word, _ in self.told]


class RecordingHub:
    """The hub's port, remembering."""

    def __init__(self) -> None:
        self.turns: list[Any] = []
        self.decodes: list[tuple[str, int, int, str]] = []
        self.engines: list[str] = []

    def start_engine(self, incarnation: str) -> None:
        self.engines.append(incarnation)

    def send_turns(self, turns: list[Any]) -> None:
        self.turns += turns

    def send_decode(self, rid: str, wake_n: int, attempt: int, queue: str, remaining_s: float) -> None:  # noqa: ARG002
        self.decodes.append((rid, wake_n, attempt, queue))

    def intake_changed(self) -> None: ...

    def front_failed(self) -> None: ...


class ScriptedStore:
    """A state store that answers what a test wrote down: a value, a function of the arguments, or an error to raise."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.round_trips: list[tuple[str, int]] = []  # (function, items) of calls for several requests

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **_: Any) -> Any:
            self.calls.append((name, args))
            answer = self.answers.get(name, [])
            if isinstance(answer, Exception):
                raise answer
            return answer(*args) if callable(answer) else answer

        return call

    def claim_each(self, items: list[ClaimItem]) -> list[Any]:
        return self._each("claim", items)

    def handoff_each(self, items: list[HandoffItem]) -> list[Any]:
        return self._each("handoff", items)

    def set_spans_each(self, items: list[SpansItem]) -> list[Any]:
        return self._each("set_spans", items)

    def _each(self, name: str, items: Sequence[Any]) -> list[Any]:
        """As the real one: an answer, or an error, for each item of one round trip; none for one is none at all."""
        self.round_trips.append((name, len(items)))
        replies: list[Any] = []
        for item in items:
            try:
                replies.append(getattr(self, name)(*(getattr(item, f.name) for f in fields(item))))
            except StateUnavailable:
                raise
            except StateError as error:
                replies.append(error)
        return replies

    def called(self, name: str) -> list[tuple[Any, ...]]:
        return [args for called, args in self.calls if called == name]
