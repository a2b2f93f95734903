"""A front without its thread, in virtual time: scripted store, recorded hub, and the engine's end of the socket."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any, cast

import msgspec

from configs.schema import Settings
from engines import messages
from engines.params import SamplingParams
from engines.process import EngineChild
from kvstore.address import KVAddress
from kvstore.clock import VirtualClock
from kvstore.errors import StateUnavailable
from kvstore.state.records import RequestBody, WorkerBeat
from kvstore.state.replies import Claimed, HandedOff, Ok
from kvstore.state.store import StateStore
from tasks.front.parts import FrontParts
from tasks.names import Identity
from tasks.options import Role, WorkerOptions
from tests.fakes import FakeChild, RecordingHub, RecordingJob, ScriptedStore

TINY_CHAT = Path(__file__).resolve().parents[3] / "models" / "tiny-chat"
RID = "abc-s00"
NO_ANSWER = StateUnavailable(command="x", reason="timeout", detail="")
ADDRESS = KVAddress(incarnation="e", host_id="h")
OWN_ADDRESS = KVAddress(incarnation="own", host_id="h")


def beat(node: str = "d0@h", role: str = "decode", **fields: Any) -> WorkerBeat:
    given = {"num_blocks": 100, "free_blocks": 100, "max_num_seqs": 8, "model": "tiny-chat", **fields}
    return WorkerBeat(incarnation=f"{node}-1", node=node, role=role, address=ADDRESS, **given)


def claimed(*, k: int = 1, n: int = 0, crash_attempts: int = 0, max_tokens: int = 8, **params: Any) -> Claimed:
    body = RequestBody(
        rid=RID, model="tiny-chat", tenant="t", priority=0, seed=1, k=k, prompt_ids=[1, 2], gateway="g", meta=b"",
        params=msgspec.msgpack.encode(SamplingParams(n=k, max_tokens=max_tokens, **params)),
    )  # fmt: skip
    return Claimed(2, [n] * k, 1, crash_attempts, 77, body, 60.0, [], [False] * k)


class Rig:
    def __init__(self, role: Role = "prefill", *, with_peer: bool = True, **answers: Any) -> None:
        self.clock = VirtualClock(100.0)
        self.store = ScriptedStore(append_batch=lambda items: [Ok()] * len(items), server_time_ms=0.0, **answers)
        self.hub = RecordingHub()
        settings = Settings()
        settings.model.path = str(TINY_CHAT)
        settings.prefill.max_batch_size = 4
        self.parts = FrontParts(
            settings,
            WorkerOptions(node="p0@h", role=role),
            identity=Identity("p0@h"),
            store=cast(StateStore, self.store),
            hub=self.hub,
            num_slots=64,
            clock=self.clock,
            on_intake=lambda: None,
        )
        self.parts.life.start()
        self.attach()
        if with_peer:
            self.parts.peers.refresh([beat()])

    def attach(self) -> None:
        """An engine that is up."""
        ours, self.engine = socket.socketpair()
        self.engine.setblocking(False)
        self.parts.engine_started(cast(EngineChild, FakeChild(cast(Any, None), ours)))
        self._reader = messages.FrameReader()
        self.says(
            messages.Ready(
                pid=1, address=OWN_ADDRESS, num_blocks=100, block_size=16, max_model_len=2048, dtype="float32",
                device="cpu", visible_device="", num_threads=1, load_s=0.0,
            )
        )  # fmt: skip

    def says(self, *said: messages.EngineMessage) -> None:
        """The engine tells this."""
        for message in said:
            self.engine.sendall(messages.frame(message))
        self.parts.read_engine()

    def heard(self) -> list[messages.FrontMessage]:
        """What the engine was told since the last look, leases and peers left out."""
        told: list[messages.FrontMessage] = []
        with contextlib.suppress(BlockingIOError):
            told = [messages.decode_front(body) for body in self._reader.feed(self.engine.recv(1 << 20))]
        return [message for message in told if not isinstance(message, messages.Lease | messages.Peers)]

    def turn(self, seconds: float = 0.0) -> None:
        """Time passes, and every part has its turn, as in the loop."""
        self.clock.advance(seconds)
        self.parts.ctx.timers.run_due()
        self.parts.ctx.calls.run()
        self.parts.renewals.turn()
        if self.parts.renewals.is_answered and not self.parts.renewals.fence.is_up:
            self.parts.publisher.turn()
            self.parts.claims.start_alone()
            self.parts.claims.fill()
        self.parts.drain_.turn()

    def wake(self, rid: str = RID, stage: str = "prefill") -> RecordingJob:
        job = RecordingJob(rid, stage)
        self.parts.submit(job)
        self.turn()
        return job

    def tokens(self, ids: list[int], index: int = 0, *, c: int = 0, finish: str = "") -> None:
        request = self.parts.ctx.live.get(RID)
        epoch = 0 if request is None else request.engine_epoch
        self.says(messages.Tokens(1, [messages.TokenOut(RID, c, index, ids, None, finish, epoch=epoch)]))

    def arrive(self, choices: list[list[int]] | None = None, **params: Any) -> None:
        self.says(messages.Incoming(RID, "x1"))
        self.says(
            messages.Arrived(
                rid=RID, xfer="x1", epoch=2, from_token="p.1", prompt_ids=[1, 2], choices=choices or [[300]],
                params=SamplingParams(**{"max_tokens": 8, **params}), seed=1, deadline_s=60.0, num_bytes=1,
                transfer_s=0.0,
            )
        )  # fmt: skip

    @property
    def appended(self) -> list[Any]:
        """All items of all append_batch calls."""
        return [item for (items,) in self.store.called("append_batch") for item in items]


def handed(n: int = 0, epoch: int = 3) -> HandedOff:
    return HandedOff(epoch, [n], [False])
