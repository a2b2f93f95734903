"""Admission of a burst: nobody is refused because somebody else is still looking whether workers live."""

from __future__ import annotations

import threading
from typing import Any

from configs.schema import ModelSettings, Settings
from kvstore.address import KVAddress
from kvstore.state.records import WorkerBeat
from kvstore.state.store import StateStore
from tests.gateway_harness import TINY_CHAT
from webapp.errors import Overloaded
from webapp.gateway import Gateway, Parts
from webapp.openai.served_model import load_served_model


class _SlowStore(StateStore):
    """A registry with one worker, which is told when both callers have asked for it."""

    def __init__(self) -> None:
        super().__init__("redis://127.0.0.1:1/0")
        self.both_ask = threading.Barrier(2)

    def workers(self, *_: Any, **__: Any) -> Any:
        self.both_ask.wait(5)
        address = KVAddress(incarnation="d0-1", host_id="here")
        return [WorkerBeat(incarnation="d0-1", node="d0@here", role="decode", model="tiny-chat", address=address)]


class _NoSender:
    def send(self, *_: Any, **__: Any) -> None: ...
    def revoke_turns(self, *_: Any) -> None: ...


def test_a_burst_after_an_idle_time_is_admitted_whole() -> None:
    now_s = 0.0
    model = load_served_model(ModelSettings(path=str(TINY_CHAT)), version="test")
    parts = Parts(store=_SlowStore(), model=model, sender=_NoSender(), secret=b"x")
    gateway = Gateway(Settings(), parts, clock=lambda: now_s)
    now_s = 100.0  # no call for so long that the last worker seen counts no more
    refused: list[Overloaded] = []

    def call() -> None:
        try:
            gateway.admit()
        except Overloaded as error:
            refused.append(error)

    threads = [threading.Thread(target=call) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)

    assert refused == []
    assert gateway.admission.num_open == 2
