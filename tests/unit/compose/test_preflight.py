from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

import configs
from compose import preflight
from compose.errors import EnvironmentProblem
from compose.local import redis_urls
from compose.ports import free_port, port_problem
from compose.preflight import (
    Findings,
    check_hardware,
    check_model,
    check_ports,
    check_transfer,
    check_workers,
    server_problems,
)
from kvstore.state.server_facts import ServerFacts
from kvstore.transport import rdma

CONFIG = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "max_position_embeddings": 2048,
}


def settings(**env: str) -> configs.Settings:
    return configs.load(env={"HOME": "/h", **env})


def facts(**changed: object) -> ServerFacts:
    values: dict[str, object] = {
        "is_valkey": True,
        "version": (9, 1, 2),
        "pid": 1,
        "role": "master",
        "is_cluster": False,
        "maxmemory_policy": "noeviction",
        "maxmemory_bytes": 0,
        "appendonly": True,
    }
    return ServerFacts(**{**values, **changed})  # type: ignore[arg-type]


def test_kv_too_small_for_one_request_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = Findings()
    check_model(settings(CELERIAC_KV__MEMORY_BYTES="1MiB", CELERIAC_MODEL__DTYPE="float32"), tmp_path, found)
    assert found.problems == [
        "kv: one request of 2048 tokens needs 64 blocks of 128KiB = 0.01 GiB, and a worker has 8 blocks. "
        "Expected `kv.memory_bytes` of at least 8MiB, or a smaller `model.max_model_len`."
    ]


def test_a_bounce_region_too_small_for_the_longest_request_each_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = Findings()
    check_model(settings(CELERIAC_KV__BOUNCE_BYTES="16MiB", CELERIAC_MODEL__DTYPE="float32"), tmp_path, found)
    (problem,) = found.problems
    assert "`kv.bounce_bytes` is 16.0 MiB. Expected at least 16.3 MiB" in problem  # 2 x 65 blocks of 128 KiB


def test_a_length_above_the_models_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    found = Findings()
    check_model(settings(CELERIAC_MODEL__MAX_MODEL_LEN="4096"), tmp_path, found)
    assert found.problems == ["model.max_model_len: 4096 is above the model's limit 2048."]


@pytest.mark.parametrize("config", ["", "{}", "[]", '{"num_attention_heads": 0}'])
def test_an_unusable_model_config_is_named(tmp_path: Path, config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    found = Findings()
    check_model(settings(), tmp_path, found)
    assert "config.json cannot be used" in found.problems[0]


def test_a_taken_port_names_who_holds_it() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        found = Findings()
        check_ports(settings(CELERIAC_GATEWAY__PORT=str(port), CELERIAC_FLOWER__PORT="0"), found)
    with pytest.raises(
        EnvironmentProblem, match=f"gateway: port {port} on 127.0.0.1 is taken by process {os.getpid()}"
    ):
        found.raise_if_any()


def test_an_address_of_another_machine_is_named() -> None:
    assert port_problem("192.0.2.1", free_port("127.0.0.1")) == "this machine has no address 192.0.2.1"


def test_prefill_workers_alone_are_refused() -> None:
    found = Findings()
    check_workers(settings(CELERIAC_DECODE__NUM_WORKERS="0"), found)
    assert found.problems == ["There are prefill workers only. Expected `--decode 1` or more, or `--both N`."]


def test_rdma_without_nixl_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma, "nixl_version", lambda: "")
    found = Findings()
    check_transfer(settings(CELERIAC_TRANSFER__PROTOCOL="rdma"), found)
    (problem,) = found.problems
    assert "nixl-cu12 is not installed here; install celeriac[rdma]" in problem

    check_transfer(settings(), found)
    assert len(found.problems) == 1


def test_a_server_that_would_lose_requests_is_refused() -> None:
    assert server_problems(facts()) == []
    assert "found Redis 6.2.1. Expected at least 7.0" in server_problems(facts(is_valkey=False, version=(6, 2, 1)))[0]
    assert "noeviction" in server_problems(facts(maxmemory_policy="allkeys-lru"))[0]
    assert "a primary that takes writes" in server_problems(facts(role="slave"))[0]
    assert "cluster node" in server_problems(facts(is_cluster=True))[0]


def test_messages_and_state_get_a_database_each() -> None:
    assert redis_urls("redis://:pw@db:6379/3") == {
        "state.broker_url": "redis://:pw@db:6379/3",
        "state.state_url": "redis://:pw@db:6379/4",
    }
    assert redis_urls("redis://db")["state.state_url"] == "redis://db/1"


@pytest.mark.parametrize(
    ("torch_version", "gpus", "says"),
    [
        ("2.13.0+cpu", ["NVIDIA H100"], "decode.device is cuda: torch 2.13.0+cpu was built for CPUs only"),
        ("2.13.0+cu130", [], "decode.device is cuda: no driver shows an NVIDIA GPU"),
        ("2.13.0+cu130", ["NVIDIA H100"], ""),
    ],
)
def test_device_cuda_is_refused_before_the_start_where_it_cannot_be(
    torch_version: str, gpus: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "version", lambda _: torch_version)
    monkeypatch.setattr(preflight, "visible_gpus", lambda: gpus)
    found = Findings()
    check_hardware(settings(CELERIAC_DECODE__DEVICE="cuda", CELERIAC_PREFILL__NUM_WORKERS="1"), found)
    assert len(found.problems) == bool(says)
    assert says in "".join(found.problems)


def test_device_cuda_of_a_role_without_workers_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "visible_gpus", list)
    found = Findings()
    none = {"CELERIAC_PREFILL__NUM_WORKERS": "0", "CELERIAC_PREFILL__DEVICE": "cuda"}
    check_hardware(settings(**none), found)
    assert found.problems == []
