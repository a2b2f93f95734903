"""Small decisions of a worker and of who wakes it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from configs.schema import Settings
from kvstore.address import KVAddress
from kvstore.link_report import LinkReport
from kvstore.state.records import WorkerBeat
from tasks.errors import GpuInUse, WorkerStartError
from tasks.front import requests
from tasks.front.engine_life import next_backoff_s
from tasks.front.publisher import PublishPace
from tasks.gpu_lock import GpuLock
from tasks.names import Identity, decode_stage, task_id
from tasks.options import default_concurrency, parse_cpus, role_of_queues, worker_options
from tasks.reaper import IdleWatch
from tasks.routing import rank_targets
from tasks.wakeups import stage_for
from tests.unit.tasks.front_rig import beat


@pytest.mark.parametrize(
    ("queues", "role"),
    [
        (["prefill.m"], "prefill"),
        (["decode.m"], "decode"),
        (["decode.m.d0@h"], "decode"),
        (["generate.m"], "both"),
        (["prefill.m", "decode.m"], "both"),
        (["celery"], None),
    ],
)
def test_the_role_follows_the_queues(queues: list[str], role: str | None) -> None:
    assert role_of_queues(queues) == role


def test_a_given_role_wins_over_the_queues() -> None:
    options = worker_options({"role": "both"}, node="n", queues=["prefill.tiny-chat"], settings=Settings())

    assert options.role == "both"


def test_a_queue_of_another_model_is_refused_by_name() -> None:
    with pytest.raises(WorkerStartError, match=r"prefill\.other"):
        worker_options({}, node="n", queues=["prefill.other"], settings=Settings())


def test_cores_that_this_process_may_not_use_are_refused() -> None:
    usable = sorted(os.sched_getaffinity(0))

    assert parse_cpus(f"{usable[0]}-{usable[0]}") == (usable[0],)
    with pytest.raises(WorkerStartError):
        parse_cpus("100000")
    with pytest.raises(WorkerStartError):
        parse_cpus("a-b")


def test_a_prefill_worker_holds_two_batches_of_messages() -> None:
    settings = Settings()

    assert default_concurrency("prefill", settings) == 2 * settings.prefill.max_batch_size
    assert default_concurrency("decode", settings) > settings.decode.max_num_seqs


def test_a_gpu_is_pinned_once_unless_it_is_shared(tmp_path: Path) -> None:
    lock = GpuLock(tmp_path, "3")

    with pytest.raises(GpuInUse) as refused:
        GpuLock(tmp_path, "3")
    assert refused.value.holder_pid == os.getpid()
    GpuLock(tmp_path, "3", share=True).release()
    GpuLock(tmp_path, "4").release()
    lock.release()
    GpuLock(tmp_path, "3").release()


def test_targets_are_ranked_by_room_and_by_what_was_just_sent() -> None:
    beats = [beat("d0@h", free_blocks=50), beat("d1@h", free_blocks=90), beat("d2@h", live=8), beat("p0@h", "prefill")]

    ranked = rank_targets(beats, model="tiny-chat", compat="", host_id="h")
    later = rank_targets(beats, model="tiny-chat", compat="", host_id="h", assigned={"d1@h": 6})

    assert [target.node for target in ranked] == ["d1@h", "d0@h", "d2@h"]
    assert [target.node for target in later] == ["d0@h", "d1@h", "d2@h"]


def beat_of(node: str, *, free_blocks: int) -> WorkerBeat:
    """A decode worker on the host that its name says."""
    address = KVAddress(incarnation=f"{node}-1", host_id=node.split("@")[1])
    return msgspec.structs.replace(beat(node, free_blocks=free_blocks), address=address)


def test_a_slow_link_weighs_against_room() -> None:
    beats = [beat_of("d0@a", free_blocks=60), beat_of("d1@b", free_blocks=90)]

    def first(*, a_s: float, b_s: float) -> str:
        links = [LinkReport("a", "tcp", 0.0, 1e9, 5, a_s), LinkReport("b", "tcp", 0.0, 1e9, 5, b_s)]
        ranked = rank_targets(beats, model="tiny-chat", compat="", host_id="h", links=links)
        return ranked[0].node

    assert first(a_s=0.010, b_s=0.012) == "d1@b"  # about as fast: the one with more room
    assert first(a_s=0.010, b_s=1.0) == "d0@a"


def test_a_host_never_met_is_taken_for_what_the_table_says() -> None:
    beats = [beat_of("d0@a", free_blocks=60), beat_of("d1@new", free_blocks=90)]
    links = [LinkReport("", "ethernet", 0.02, 1e9, 0, 2.0), LinkReport("a", "tcp", 0.0, 1e9, 5, 0.010)]

    ranked = rank_targets(beats, model="tiny-chat", compat="", host_id="h", links=links)

    assert [target.node for target in ranked] == ["d0@a", "d1@new"]


def test_draining_workers_and_other_models_are_no_targets() -> None:
    beats = [beat("d0@h", draining=True), beat("d1@h", model="other")]

    assert rank_targets(beats, model="tiny-chat", compat="", host_id="h") == []


def test_wake_ups_go_to_the_split_roles_if_both_are_there() -> None:
    prefill, decode, both = beat("p@h", "prefill"), beat("d@h"), beat("b@h", "both")

    assert stage_for([prefill, decode, both], "tiny-chat") == "prefill"
    assert stage_for([prefill, both], "tiny-chat") == "generate"
    assert stage_for([both], "tiny-chat") == "generate"
    assert stage_for([], "tiny-chat") == "prefill"


def test_task_ids_and_tokens_are_never_used_twice() -> None:
    identity = Identity("d0@h")
    tokens = {identity.next_token(), identity.next_token()}
    former = identity.renew()

    assert len(tokens | {identity.next_token()}) == 3
    assert all(token.startswith(f"{former}.") for token in tokens)
    assert task_id("r-s00", decode_stage(2), 5) == "r-s00.decode-2.5"


def test_idle_means_empty_and_a_free_hand_for_a_second() -> None:
    watch = IdleWatch()
    looks = [(0.0, True, True), (0.5, True, True), (1.0, True, True), (1.5, False, True), (2.0, True, True)]

    hints = [watch.look(now, is_queue_empty=empty, has_free_hand=free) for now, empty, free in looks]

    assert hints == [False, False, True, False, False]


def test_an_engine_that_keeps_dying_is_started_ever_more_slowly() -> None:
    waits, wait = [], 0.0
    for _ in range(9):
        wait = next_backoff_s(wait, 0.5)
        waits.append(wait)

    assert waits[0] == 0.1
    assert waits == sorted(waits)
    assert waits[-1] == 10.0
    assert next_backoff_s(10.0, 60.0) == 0.1


def test_publishing_slows_down_with_the_server_and_recovers() -> None:
    pace = PublishPace()
    assert pace.interval_s == 0.0
    for _ in range(10):
        pace.measured(0.01)
    assert pace.interval_s == 0.02
    for _ in range(10):
        pace.measured(0.0005)
    assert pace.interval_s == 0.0


def test_every_phase_of_a_request_can_reach_its_end() -> None:
    for phase in requests.Phase:
        reached, new = {phase}, {phase}
        while new:
            new = {after for before in new for after in requests.TRANSITIONS[before]} - reached
            reached |= new
        assert requests.Phase.ENDED in reached
