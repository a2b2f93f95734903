"""The writer's side of a hand-off, in virtual time, over a KV node that only writes down what it is asked."""

from __future__ import annotations

from typing import Any

import pytest

from engines.handoff_reader import TOO_LARGE
from engines.handoff_writer import MAX_PUSH_FAILURES, MAX_RESERVES_IN_FLIGHT, PATIENCE_S, RETRY_S, HandoffWriter
from engines.messages import Add, EngineMessage, Failed, Granted, NoGrant, Pushed, Target
from engines.params import SamplingParams
from engines.scheduler.plan import ScheduledSequence, StepPlan
from engines.sequence import Sequence
from kvstore.address import KVAddress
from kvstore.blocks import BlockPool
from kvstore.clock import VirtualClock
from kvstore.transport import GrantReceived, GrantRefused, PushFailed, Refused

BLOCK_SIZE = 4


class WrittenKV:
    """A KV node that answers nothing by itself."""

    num_layers = 2

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def reserve(self, target: KVAddress, xfer: str, **_: Any) -> None:
        self.calls.append(("reserve", target.incarnation, xfer))

    def push(self, xfer: str, pairs: list[tuple[int, int]], lo: int, hi: int) -> None:
        self.calls.append(("push", xfer, tuple(pairs), lo, hi))

    def commit(self, xfer: str, *, src_blocks: list[int], num_tokens: int, **_: Any) -> None:
        self.calls.append(("commit", xfer, tuple(src_blocks), num_tokens))

    def abandon(self, xfer: str) -> None:
        self.calls.append(("abandon", xfer))

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == name]


class Rig:
    def __init__(self, *nodes: str) -> None:
        self.clock = VirtualClock()
        self.kv = WrittenKV()
        self.pool = BlockPool(16)
        self.said: list[EngineMessage] = []
        self.scheduled: list[Sequence] = []
        self.writer = HandoffWriter(
            node=self.kv,  # type: ignore[arg-type]
            pool=self.pool,
            block_size=BLOCK_SIZE,
            block_bytes=64,
            incarnation="p",
            send=self.said.append,
            schedule=self.scheduled.append,
            unschedule=self.scheduled.remove,
            clock=self.clock,
        )
        self.targets = [Target(node, KVAddress(incarnation=node, host_id="h")) for node in nodes or ("d0",)]

    def add(self, rid: str = "r", num_tokens: int = 6) -> Sequence:
        params = SamplingParams(max_tokens=4)
        prompt = list(range(num_tokens))
        add = Add(
            rid=rid, epoch=2, token="t", mode="push", prompt_ids=prompt, choices=[[]], params=params, seed=0,
            targets=self.targets,
        )  # fmt: skip
        sequence = Sequence(rid=rid, choice=0, prompt_token_ids=prompt, params=params, seed=0)
        self.writer.add(add, sequence, num_blocks=3)
        return sequence

    def last_xfer(self) -> str:
        return str(self.kv.named("reserve")[-1][2])

    def grant(self) -> None:
        self.writer.on_grant(GrantReceived(self.last_xfer(), 3))

    def compute(self, sequence: Sequence, *ends: int) -> None:
        """Steps that end at these positions; the blocks were taken at the first."""
        if not sequence.block_table:
            sequence.block_table = self.pool.allocate(-(-sequence.num_tokens // BLOCK_SIZE))
        for end in ends:
            start = sequence.num_computed_tokens
            batches = self.writer.blocks_of_step(StepPlan(1, (ScheduledSequence(sequence, start, end - start),)))
            self.writer.push_layers(batches, 0, 1)
            self.writer.push_layers(batches, 1, 2)
            self.writer.step_pushed(batches)
            sequence.num_computed_tokens = end
        if sequence.num_computed_tokens == sequence.num_tokens:
            self.writer.computed(sequence, [[9]])


def test_a_sequence_is_scheduled_only_with_a_grant() -> None:
    rig = Rig()
    sequence = rig.add()
    assert rig.scheduled == []

    rig.grant()

    assert rig.scheduled == [sequence]
    assert rig.said == [Granted("r", "p:1", "d0", 1)]


def test_blocks_go_out_as_chunks_fill_them_and_the_last_one_with_the_end() -> None:
    rig = Rig()
    sequence = rig.add(num_tokens=10)
    rig.grant()

    rig.compute(sequence, 5, 7, 10)

    a, b, c = sequence.block_table
    first = [("push", "p:1", ((a, 0),), 0, 1), ("push", "p:1", ((a, 0),), 1, 2)]
    rest = [("push", "p:1", ((b, 1), (c, 2)), 0, 1), ("push", "p:1", ((b, 1), (c, 2)), 1, 2)]
    assert rig.kv.named("push") == first + rest
    assert rig.kv.named("commit") == [("commit", "p:1", (a, b, c), 10)]


def test_handed_over_blocks_are_free_at_once() -> None:
    rig = Rig()
    sequence = rig.add()
    rig.grant()
    rig.compute(sequence, 6)

    rig.writer.on_handed("p:1")

    assert rig.pool.num_used == 0
    assert isinstance(rig.said[-1], Pushed)
    assert rig.said[-1].outcome == "handed"
    assert not rig.writer.knows("r")


def test_the_end_of_a_push_tells_when_the_first_grant_came_and_the_prompt_was_computed() -> None:
    rig = Rig("d0", "d1")
    sequence = rig.add()
    rig.clock.advance(1.0)
    rig.grant()
    rig.clock.advance(2.0)
    rig.compute(sequence, 6)
    rig.clock.advance(4.0)
    rig.writer.on_failed(PushFailed("p:1", "link lost"))
    rig.writer.seek()
    rig.grant()
    rig.writer.on_handed("p:2")

    (end,) = [said for said in rig.said if isinstance(said, Pushed)]
    assert (end.granted_s, end.computed_s) == (1.0, 3.0)


def test_a_refused_handoff_is_told_and_frees() -> None:
    rig = Rig()
    sequence = rig.add()
    rig.grant()
    rig.compute(sequence, 6)

    rig.writer.on_refused(Refused("p:1", "stale"))

    assert rig.pool.num_used == 0
    assert isinstance(rig.said[-1], Pushed)
    assert (rig.said[-1].outcome, rig.said[-1].reason) == ("refused", "stale")


def test_a_full_worker_is_passed_over_for_the_next_and_asked_again_later() -> None:
    rig = Rig("d0", "d1")
    rig.add()

    rig.writer.on_refusal(GrantRefused("p:1", "no_space"))
    rig.writer.seek()
    rig.writer.on_refusal(GrantRefused("p:2", "no_space"))
    rig.writer.seek()
    assert [call[1] for call in rig.kv.named("reserve")] == ["d0", "d1"]
    assert rig.writer.next_wakeup_s() == pytest.approx(RETRY_S)

    rig.clock.advance(RETRY_S)
    rig.writer.seek()

    assert [call[1] for call in rig.kv.named("reserve")] == ["d0", "d1", "d0"]


def test_what_no_decode_worker_could_ever_hold_is_refused_by_name() -> None:
    rig = Rig("d0", "d1")
    rig.add()

    rig.writer.on_refusal(GrantRefused("p:1", TOO_LARGE))
    rig.writer.seek()
    assert rig.said == []
    rig.writer.on_refusal(GrantRefused("p:2", TOO_LARGE))

    assert isinstance(rig.said[-1], Failed)
    assert rig.said[-1].code == "context_length_exceeded"
    assert not rig.writer.knows("r")


def test_only_the_oldest_ask_while_pools_are_full() -> None:
    rig = Rig()
    for i in range(MAX_RESERVES_IN_FLIGHT + 5):
        rig.add(f"r{i}")

    assert len(rig.kv.named("reserve")) == MAX_RESERVES_IN_FLIGHT
    assert rig.writer.next_wakeup_s() == pytest.approx(PATIENCE_S)


def test_patience_ends_with_no_grant() -> None:
    rig = Rig()
    rig.add()
    rig.writer.on_refusal(GrantRefused("p:1", "no_space"))

    rig.clock.advance(PATIENCE_S + 0.1)
    rig.writer.seek()

    assert isinstance(rig.said[-1], NoGrant)
    assert not rig.writer.knows("r")


def test_a_failed_push_goes_whole_to_another_worker_without_computing_again() -> None:
    rig = Rig("d0", "d1")
    sequence = rig.add()
    rig.grant()
    rig.compute(sequence, 6)

    rig.writer.on_failed(PushFailed("p:1", "link lost"))
    rig.writer.seek()
    rig.grant()

    a, b = sequence.block_table
    assert rig.kv.named("push")[-1] == ("push", "p:2", ((a, 0), (b, 1)), 0, 2)
    assert rig.kv.named("commit")[-1] == ("commit", "p:2", (a, b), 6)
    assert len(rig.scheduled) == 1
    assert rig.said[-1] == Granted("r", "p:2", "d1", 2)


def test_a_link_lost_while_computing_restarts_the_push_from_the_first_block() -> None:
    rig = Rig("d0", "d1")
    sequence = rig.add(num_tokens=10)
    rig.grant()
    rig.compute(sequence, 5)

    rig.writer.on_failed(PushFailed("p:1", "link lost"))
    rig.writer.seek()
    rig.grant()
    rig.compute(sequence, 10)

    a, b, c = sequence.block_table
    assert rig.kv.named("push")[-1] == ("push", "p:2", ((a, 0), (b, 1), (c, 2)), 1, 2)
    assert rig.kv.named("commit") == [("commit", "p:2", (a, b, c), 10)]


def test_a_push_that_fails_everywhere_is_given_up() -> None:
    rig = Rig()
    sequence = rig.add()
    rig.grant()
    rig.compute(sequence, 6)

    for _ in range(MAX_PUSH_FAILURES):
        rig.writer.on_failed(PushFailed(rig.last_xfer(), "link lost"))
        rig.writer.seek()
        if rig.writer.knows("r"):
            rig.grant()

    assert rig.pool.num_used == 0
    assert isinstance(rig.said[-1], Pushed)
    assert rig.said[-1].outcome == "failed"


def test_a_dropped_requests_blocks_wait_until_nobody_reads_them() -> None:
    rig = Rig()
    sequence = rig.add()
    rig.grant()
    rig.compute(sequence, 6)

    rig.writer.drop("r")
    assert rig.kv.named("abandon") == [("abandon", "p:1")]
    assert rig.pool.num_used == 2

    rig.writer.on_source_free("p:1")
    assert rig.pool.num_used == 0


def test_a_late_grant_of_a_dropped_request_starts_nothing() -> None:
    rig = Rig()
    rig.add()
    rig.writer.drop("r")

    rig.grant()

    assert rig.scheduled == []
    assert rig.said == []
