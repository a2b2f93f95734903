from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import configs
from compose.layout import ClusterPlan, child_env, core_list, divide_cores, plan_cluster


def plan(cores: list[int], *, gpus: tuple[str, ...] = (), **env: str) -> ClusterPlan:
    settings = configs.load(env={"HOME": "/h", **env})
    return plan_cluster(
        settings,
        cluster_file=Path("/r/cluster.yaml"),
        cores=cores,
        hostname="host",
        env={"PATH": "/bin"},
        gpus=gpus,
    )


def pins(planned: ClusterPlan) -> list[str]:
    """What each worker is told of GPUs."""
    words = [" ".join(worker.argv) for worker in planned.of("worker")]
    return [" ".join(re.findall(r"--gpu \S+|--share-gpu", line)) for line in words]


def test_each_worker_has_a_gpu_of_its_own_while_there_are_enough() -> None:
    planned = plan([0, 1], gpus=("0", "2"))
    assert pins(planned) == ["--gpu 0", "--gpu 2"]
    assert planned.notices == ()


def test_more_workers_than_gpus_share_them_with_a_notice() -> None:
    planned = plan([0, 1, 2], gpus=("0", "1"), CELERIAC_DECODE__NUM_WORKERS="2")
    assert pins(planned) == ["--gpu 0 --share-gpu", "--gpu 1 --share-gpu", "--gpu 0 --share-gpu"]
    assert planned.notices == ("3 workers share 2 GPUs: each takes `kv.memory_bytes` of its GPU's memory.",)


def test_workers_on_the_cpu_and_machines_without_gpus_pin_nothing() -> None:
    assert pins(plan([0, 1], gpus=("0",), CELERIAC_PREFILL__DEVICE="cpu")) == ["", "--gpu 0"]
    assert pins(plan([0, 1], gpus=("0",), CELERIAC_DECODE__TENSOR_PARALLEL_SIZE="2")) == ["--gpu 0", ""]
    assert pins(plan([0, 1])) == ["", ""]


def test_default_cluster_has_a_prefill_and_a_decode_worker_with_a_core_each() -> None:
    workers = plan([0, 1]).of("worker")
    assert [(w.name, w.node, w.role, w.cpus) for w in workers] == [
        ("p0", "p0@host", "prefill", (0,)),
        ("d0", "d0@host", "decode", (1,)),
    ]
    command = " ".join(workers[0].argv[1:])
    assert command.startswith("-m celery -A tasks worker -Q prefill.tiny-chat -n p0@host --role prefill --cpus 0")
    assert "-Q decode.tiny-chat.d0@host " in " ".join(workers[1].argv)


def test_every_process_finds_the_settings_of_the_cluster() -> None:
    for child in plan([0, 1]).children:
        assert child.env["CELERIAC_CONFIG"] == "/r/cluster.yaml"
        assert child.env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_monolithic_workers_listen_to_the_generate_queue() -> None:
    zero = {"CELERIAC_PREFILL__NUM_WORKERS": "0", "CELERIAC_DECODE__NUM_WORKERS": "0"}
    workers = plan([0, 1], CELERIAC_BOTH__NUM_WORKERS="2", **zero).of("worker")
    assert [w.node for w in workers] == ["b0@host", "b1@host"]
    assert "generate.tiny-chat" in workers[0].argv


def test_settings_of_the_environment_do_not_reach_children_twice() -> None:
    env = {"CELERIAC_KV__BLOCK_SIZE": "16", "CELERIAC_CLUSTER_SECRET": "s", "PATH": "/bin", "CELERIAC_CONFIG": "mine"}
    child = child_env(env, Path("/r/cluster.yaml"))
    assert "CELERIAC_KV__BLOCK_SIZE" not in child
    assert child["CELERIAC_CLUSTER_SECRET"] == "s"
    assert child["CELERIAC_CONFIG"] == "/r/cluster.yaml"


def test_flower_password_is_in_no_argument_list() -> None:
    (flower,) = plan([0, 1], CELERIAC_FLOWER__BASIC_AUTH="me:hunter2").of("flower")
    assert "hunter2" not in " ".join(flower.argv)
    assert flower.env["FLOWER_BASIC_AUTH"] == "me:hunter2"
    assert "FLOWER_UNAUTHENTICATED_API" not in flower.env


def test_flower_can_be_left_out() -> None:
    assert plan([0, 1], CELERIAC_FLOWER__ENABLED="false").of("flower") == []


def test_too_few_cores_are_shared_with_a_notice() -> None:
    assert plan([3], CELERIAC_DECODE__NUM_WORKERS="2").notices == (
        "3 workers share 1 cores: they will slow each other down.",
    )


@given(st.sets(st.integers(0, 255), min_size=1, max_size=64), st.integers(1, 64))
def test_no_core_is_lost_and_none_given_twice_while_there_are_enough(cores: set[int], num_workers: int) -> None:
    shares, notice = divide_cores(sorted(cores), num_workers)
    assert len(shares) == num_workers
    assert all(shares)
    if len(cores) >= num_workers:
        assert sorted(core for share in shares for core in share) == sorted(cores)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert notice == ""
    else:
        assert {core for share in shares for core in share} == cores
        assert notice


@pytest.mark.parametrize(("cpus", "text"), [((0,), "0"), ((0, 1, 2), "0-2"), ((0, 2, 3, 9), "0,2-3,9")])
def test_cores_are_written_as_the_worker_reads_them(cpus: tuple[int, ...], text: str) -> None:
    assert core_list(cpus) == text
