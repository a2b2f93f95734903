"""A prefill engine tries each decode worker when it hears of it: real engines, real transports."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from engines.messages import Peers, Target
from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair


@pytest.fixture(params=["shm", "tcp"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EnginePair]:
    engines = EnginePair(tmp_path, TINY_CHAT, protocol=request.param)
    yield engines
    engines.close()


def _links(engines: EnginePair) -> float:
    counters = engines.prefill.engine.node.counters()
    return counters.get("links_shm", 0) + counters.get("links_tcp", 0)


def test_every_byte_of_a_block_goes_to_a_new_decode_worker_before_any_request(
    pair: EnginePair, caplog: pytest.LogCaptureFixture
) -> None:
    core, node = pair.prefill.engine.core, pair.prefill.engine.node
    with caplog.at_level(logging.INFO):
        core.handle(Peers([pair.target]))
        pair.run(lambda: "every byte arrived" in caplog.text)

    assert node.counters()["sent_bytes"] > 0
    pair.run(lambda: not pair.blocks_in_use())
    assert pair.decode.take() == [], "the front of the decode worker heard of it"


def test_a_worker_is_tried_once_as_long_as_it_lives(pair: EnginePair, caplog: pytest.LogCaptureFixture) -> None:
    core, node = pair.prefill.engine.core, pair.prefill.engine.node
    with caplog.at_level(logging.INFO):
        core.handle(Peers([pair.target]))
        pair.run(lambda: "every byte arrived" in caplog.text)
        sent = node.counters()["sent_bytes"]

        core.handle(Peers([pair.target]))
        for _ in range(20):
            pair.turn()

    assert node.counters()["sent_bytes"] == sent


def test_a_worker_that_cannot_be_reached_is_named_and_left_out(
    pair: EnginePair, caplog: pytest.LogCaptureFixture
) -> None:
    address = msgspec.structs.replace(
        pair.target.address, incarnation="nobody", unix_path="/nonexistent/kv.sock", tcp_host="127.0.0.1", tcp_port=1
    )
    core = pair.prefill.engine.core

    core.handle(Peers([Target("lost@h", address), pair.target]))
    pair.run(lambda: "dry run with lost@h failed (unreachable)" in caplog.text)

    assert [target.node for target in core._dry_runs.usable] == ["d"]
    pair.run(lambda: not pair.blocks_in_use())
    pair.add("r-s00", [1, 2, 3], max_tokens=4, ignore_eos=True)  # goes to the one that works
    pair.run(lambda: bool(pair.decode.finished))
