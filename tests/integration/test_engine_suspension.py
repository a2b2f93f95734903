"""An engine whose front got no answer from Redis steps on for a while, then waits without spinning, and goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.core import MAX_STALE_STEPS, SUSPEND_AFTER_S
from engines.messages import Lease
from kvstore.clock import VirtualClock
from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair

HELLO = json.loads((TINY_CHAT / "prompts.jsonl").read_text().splitlines()[0])


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[EnginePair]:
    pair = EnginePair(tmp_path, TINY_CHAT)
    yield pair
    pair.close()


def test_a_suspended_engine_sleeps_until_its_lease_comes(pair: EnginePair) -> None:
    pair.add("r", HELLO["prompt_ids"], max_tokens=2000, ignore_eos=True)
    pair.run(lambda: len(pair.decode.tokens.get(("r", 0), {})) > 3)
    core, clock = pair.decode.engine.core, VirtualClock(pair.decode.engine.core._clock())
    core._clock = clock
    core.handle(Lease())

    clock.advance(SUSPEND_AFTER_S - 0.1)
    assert core.step(), "a short outage does not stop it"
    clock.advance(SUSPEND_AFTER_S)
    assert not core.step()
    assert core.next_wakeup_s() > clock(), "it would spin"

    core.handle(Lease())
    assert core.step()


def test_an_outage_brings_no_more_tokens_than_the_buffer_holds(pair: EnginePair) -> None:
    pair.add("r", HELLO["prompt_ids"], max_tokens=2000, ignore_eos=True)
    pair.run(lambda: len(pair.decode.tokens.get(("r", 0), {})) > 3)
    core, clock = pair.decode.engine.core, VirtualClock(pair.decode.engine.core._clock())
    core._clock = clock
    clock.advance(2.0)
    pair.decode.take()
    before = len(pair.decode.tokens["r", 0])

    for _ in range(MAX_STALE_STEPS + 50):
        core.step()

    pair.decode.take()
    assert len(pair.decode.tokens["r", 0]) - before == MAX_STALE_STEPS
