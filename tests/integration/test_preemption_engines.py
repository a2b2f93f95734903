"""Decode engines with far fewer blocks than their load: swapped and moved sequences end with the tokens of an
undisturbed run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import configs
from engines.build import build_engine
from engines.messages import Arrived, Drop, EngineMessage, NoGrant, Peers, Promote, Pushed, Target
from engines.process import EngineConfig
from tests.cluster import TINY_CHAT
from tests.engine_pair import SECRET, EnginePair, Half

CONTEXT = 256  # eight blocks of 32 tokens
MAX_TOKENS = 120
NUM_REQUESTS = 3  # all granted at once; what they grow by is more than there is
HOW: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "frequency_penalty": 0.5}]


def _prompt(i: int) -> list[int]:
    rng = random.Random(i)
    return [rng.randrange(300, 2000) for _ in range((20, 50)[i % 2])]


def _fill(pair: EnginePair) -> None:
    for i in range(NUM_REQUESTS):
        pair.add(f"r{i}", _prompt(i), max_tokens=MAX_TOKENS, ignore_eos=True, **HOW[i % 2])


def _flags(**more: str) -> dict[str, str]:
    return {"model.max_model_len": str(CONTEXT), **more}


def _preempt_counters(half: Half) -> dict[str, float]:
    counters = half.engine.core.stats().counters
    return {name.removeprefix("preempt_"): counters[name] for name in counters if name.startswith("preempt_")}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nobody claims a request again that found no grant, so none may be given up because the machine is slow."""
    monkeypatch.setattr("engines.handoff_writer.PATIENCE_S", 120.0)
    monkeypatch.setattr("engines.handoff_writer.MOVE_PATIENCE_S", 60.0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    pair = EnginePair(tmp_path_factory.mktemp("run"), TINY_CHAT, flags=_flags())
    try:
        _fill(pair)
        pair.run(lambda: len(pair.decode.finished) == NUM_REQUESTS, timeout_s=100)
        assert _preempt_counters(pair.decode)["released"] == 0
        return [pair.output(f"r{i}") for i in range(NUM_REQUESTS)]
    finally:
        pair.close()


class Trio(EnginePair):
    """A prefill engine and two decode engines; the first decode engine knows the second as a peer."""

    def __init__(self, run_dir: Path, *, second_blocks: int, flags: dict[str, str]) -> None:
        super().__init__(run_dir, TINY_CHAT, decode_blocks=CONTEXT // 32, flags=flags)
        settings = configs.load(
            env={},
            flags={
                "model.path": str(TINY_CHAT),
                "model.dtype": "float32",
                "run_dir": str(run_dir),
                "kv.num_blocks": str(second_blocks),
                **flags,
            },
        )
        said: list[EngineMessage] = []
        config = EngineConfig(settings=settings, role="decode", node="second", incarnation="second-1", secret=SECRET)
        self.second = Half(build_engine(config, said.append), said)
        self.halves["second"] = self.second
        self.heard: list[EngineMessage] = []  # of the first decode engine
        self.on_second: Callable[[Arrived], bool] = lambda _: True
        self.decode.engine.core.handle(Peers([Target("second", self.second.engine.address)]))

        take = self.decode.take
        self.decode.take = lambda: self._note(take())  # type: ignore[method-assign]

    def _note(self, messages: list[EngineMessage]) -> list[EngineMessage]:
        self.heard += messages
        return messages

    def turn(self) -> None:
        super().turn()
        for message in self.second.take():
            if isinstance(message, Arrived) and self.on_second(message):
                self.second.engine.core.handle(Promote(message.rid, message.xfer, message.epoch + 1, "d.2"))

    def output(self, rid: str, c: int = 0) -> list[int]:
        told = {**self.prefill.tokens.get((rid, c), {}), **self.decode.tokens.get((rid, c), {})}
        second = self.second.tokens.get((rid, c), {})
        assert not told.keys() & second.keys(), "a token was told twice"
        return [token_id for _, token_id in sorted({**told, **second}.items())]

    def heard_of(self, kind: type) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


@pytest.fixture
def trio(tmp_path: Path) -> Iterator[Trio]:
    trio = Trio(tmp_path, second_blocks=64, flags=_flags(**{"kv.swap_bytes": "0B"}))
    yield trio
    trio.close()


def test_sequences_that_waited_in_host_memory_end_with_the_tokens_of_an_undisturbed_run(
    tmp_path: Path, undisturbed: list[list[int]]
) -> None:
    pair = EnginePair(tmp_path, TINY_CHAT, decode_blocks=CONTEXT // 32, flags=_flags())
    try:
        _fill(pair)
        pair.run(lambda: len(pair.decode.finished) == NUM_REQUESTS, timeout_s=100)

        counters = _preempt_counters(pair.decode)
        assert counters["swapped_out"] == counters["swapped_in"] >= 1
        assert (counters["released"], counters["swap_damaged"]) == (0, 0)
        assert [pair.output(f"r{i}") for i in range(NUM_REQUESTS)] == undisturbed
        pair.run(lambda: not pair.blocks_in_use(), timeout_s=60)
    finally:
        pair.close()


def test_kv_that_was_damaged_in_host_memory_is_never_decoded(tmp_path: Path, undisturbed: list[list[int]]) -> None:
    """The request goes back to the queue; whoever is undamaged ends as ever."""
    pair = EnginePair(tmp_path, TINY_CHAT, decode_blocks=CONTEXT // 32, flags=_flags())
    try:
        _fill(pair)
        store = pair.decode.engine.core._relief._store
        assert store is not None

        def is_damaged() -> bool:
            store._pages.view(-1)[::5] = 0.25  # all that lies there
            return _preempt_counters(pair.decode)["swap_damaged"] >= 1

        pair.run(is_damaged, timeout_s=100)
        pair.run(lambda: bool(pair.decode.finished), timeout_s=100)

        counters = _preempt_counters(pair.decode)
        assert counters["released"] == counters["swap_damaged"]
        for i in range(NUM_REQUESTS):
            output = pair.output(f"r{i}")
            assert output == undisturbed[i][: len(output)]
    finally:
        pair.close()


def test_a_sequence_that_moved_to_another_worker_goes_on_exactly(trio: Trio, undisturbed: list[list[int]]) -> None:
    _fill(trio)
    trio.run(lambda: len(trio.decode.finished) + len(trio.second.finished) == NUM_REQUESTS, timeout_s=100)

    assert _preempt_counters(trio.decode)["moved"] >= 1
    assert _preempt_counters(trio.decode)["released"] == 0
    assert {message.outcome for message in trio.heard_of(Pushed)} == {"handed"}
    assert [trio.output(f"r{i}") for i in range(NUM_REQUESTS)] == undisturbed
    trio.run(lambda: not trio.blocks_in_use(), timeout_s=60)


def test_a_receiver_reads_the_count_of_preemptions_with_the_kv(trio: Trio) -> None:
    counts: list[int] = []

    def look(message: Arrived) -> bool:
        (arrival,) = trio.second.engine.core._reader._arrivals.values()
        counts.append(arrival.state.num_preemptions)
        assert message.from_token == "d.1"
        assert message.epoch == 3
        return True

    trio.on_second = look
    _fill(trio)
    trio.run(lambda: bool(counts), timeout_s=100)

    assert counts == [1]


def test_a_move_that_nobody_takes_is_a_release(tmp_path: Path) -> None:
    trio = Trio(tmp_path, second_blocks=CONTEXT // 32, flags=_flags(**{"kv.swap_bytes": "0B"}))
    try:
        reader = trio.second.engine.core._reader
        reader._may_admit = lambda *_: False
        _fill(trio)
        trio.run(lambda: bool(trio.heard_of(NoGrant)), timeout_s=100)

        rid = trio.heard_of(NoGrant)[0].rid
        trio.decode.engine.core.handle(Drop(rid))
        assert _preempt_counters(trio.decode)["move_refused"] >= 1
        trio.run(lambda: len(trio.decode.finished) + len(trio.heard_of(NoGrant)) >= NUM_REQUESTS, timeout_s=100)
        trio.run(lambda: not trio.blocks_in_use(), timeout_s=60)
    finally:
        trio.close()


def test_a_receiver_that_dies_in_mid_move_costs_no_token(tmp_path: Path) -> None:
    """Its node is gone before COMMIT is answered: the sequence is still here, and goes back to the queue."""
    trio = Trio(tmp_path, second_blocks=64, flags=_flags(**{"kv.swap_bytes": "0B"}))
    try:
        died: list[str] = []

        def die(message: Arrived) -> bool:
            died.append(message.rid)
            return False

        trio.on_second = die
        _fill(trio)
        trio.run(lambda: bool(died), timeout_s=100)
        del trio.halves["second"]
        trio.second.engine.close()
        trio.decode.engine.core.handle(Peers([]))

        trio.run(lambda: any(m.rid == died[0] for m in trio.heard_of(NoGrant) + trio.heard_of(Pushed)), timeout_s=90)

        (told,) = [m for m in trio.heard_of(NoGrant) + trio.heard_of(Pushed) if m.rid == died[0]]
        assert isinstance(told, NoGrant) or told.outcome == "failed"
    finally:
        trio.close()
