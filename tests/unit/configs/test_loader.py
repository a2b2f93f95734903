from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

import configs
from configs.loader import load_with_origins


def faults_of(text: str, tmp_path: Path, **env: str) -> list[str]:
    """What is said about a file with this text."""
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(configs.ConfigError) as caught:
        configs.load(file, env={"HOME": str(tmp_path), **env})
    return [str(fault).replace(str(tmp_path) + "/", "") for fault in caught.value.faults]


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("gateway:\n  port: 1001\n  threads: 11\n  workers: 2\n")
    env = {"HOME": str(tmp_path), "CELERIAC_GATEWAY__PORT": "1002", "CELERIAC_GATEWAY__THREADS": "12"}

    loaded = load_with_origins(file, env=env, flags={"gateway.port": "1003"}, flag_names={"gateway.port": "--port"})

    gateway = loaded.settings.gateway
    assert (gateway.port, gateway.threads, gateway.workers, gateway.host) == (1003, 12, 2, "127.0.0.1")
    assert loaded.origins["gateway.port"] == "--port"
    assert loaded.origins["gateway.threads"] == "CELERIAC_GATEWAY__THREADS"
    assert loaded.origins["gateway.workers"] == f"{file}:4"
    assert loaded.is_default("gateway.host")


def test_unknown_key_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    assert faults_of("decode:\n  max_batchsize: 3\n", tmp_path) == [
        "serve.yaml:2: decode.max_batchsize: unknown setting; did you mean `decode.max_batch_size`?"
    ]


def test_known_key_in_the_wrong_section_is_suggested(tmp_path: Path) -> None:
    (fault,) = faults_of("prefill:\n  watermark: 0.1\n", tmp_path)
    assert "did you mean `decode.watermark`?" in fault


def test_all_faults_of_all_sources_are_reported_at_once(tmp_path: Path) -> None:
    text = "kv:\n  block_size: two\n  memory_bytes: 20\ngateway:\n  port: 70000\n"
    faults = faults_of(text, tmp_path, CELERIAC_KV__EVICTION="lur", CELERIAC_KV__NO_SUCH="1")
    assert len(faults) == 5
    assert "'two' is not a whole number; expected a whole number, 1 to 1024" in faults[0]
    assert "CELERIAC_KV__EVICTION: kv.eviction" in faults[3]
    assert "did you mean `lru`?" in faults[3]


def test_every_kind_of_wrong_scalar_names_what_was_expected(tmp_path: Path) -> None:
    for text in ("two", "yes", "08", "1_000", "1.5", "''", ""):
        (fault,) = faults_of(f"decode:\n  num_workers: {text}\n", tmp_path)
        assert "a whole number, 0 to 4096" in fault
    for text in ("yes", "on", "1", "True"):
        (fault,) = faults_of(f"transfer:\n  checksum: {text}\n", tmp_path)
        assert "true or false" in fault
    for text in (".nan", "nan", "inf", "5m", "-1"):
        (fault,) = faults_of(f"worker:\n  drain_timeout_s: {text}\n", tmp_path)
        assert "a number, 0 to 86400" in fault


def test_size_without_unit_is_refused(tmp_path: Path) -> None:
    for text in ("20", "20g", "-1GiB", "GiB", "1 GiB 2"):
        (fault,) = faults_of(f"kv:\n  memory_bytes: {text}\n", tmp_path)
        assert "a size with its unit" in fault


def test_variables_of_the_environment_stand_in_values(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("state:\n  broker_url: redis://:${PASSWORD}@db:6379/0\n")
    settings = configs.load(file, env={"HOME": "/h", "PASSWORD": "pw"})
    assert settings.state.broker_url == "redis://:pw@db:6379/0"

    (fault,) = faults_of("state:\n  broker_url: redis://:${PASSWORD}@db:6379/0\n", tmp_path)
    assert fault.startswith("serve.yaml:2: state.broker_url: the environment has no variable PASSWORD")


def test_a_bad_url_is_not_shown(tmp_path: Path) -> None:
    (fault,) = faults_of("state:\n  state_url: http://:hunter2@db\n", tmp_path)
    assert "hunter2" not in fault


def test_empty_file_gives_defaults_and_a_notice(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("# nothing\n")
    loaded = load_with_origins(file, env={"HOME": "/h"})
    assert loaded.settings.gateway.port == 8000
    assert "is empty" in loaded.notices[0]


def test_paths_become_absolute(tmp_path: Path) -> None:
    settings = configs.load(env={"HOME": str(tmp_path)})
    assert settings.run_dir == str(tmp_path / ".local/state/celeriac/default")
    assert settings.secret_file == settings.run_dir + "/secret"
    assert configs.load(env={"XDG_STATE_HOME": "/s"}).run_dir == "/s/celeriac/default"


def test_a_running_cluster_lends_its_settings_to_a_worker_started_by_hand(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    run_dir = tmp_path / "celeriac" / "default"
    run_dir.mkdir(parents=True)
    (run_dir / "cluster.yaml").write_text("gateway:\n  port: 4242\n")
    assert configs.load(env=env).gateway.port == 8000  # left by a cluster that no longer runs

    lock = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        loaded = load_with_origins(env=env)
        alone = load_with_origins(env=env, join_running=False)
    finally:
        os.close(lock)

    assert loaded.settings.gateway.port == 4242
    assert loaded.origins["gateway.port"] == f"running cluster {run_dir}"
    assert alone.settings.gateway.port == 8000


def test_settings_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    text = (
        "kv:\n  block_size: 3\n  num_blocks: 2\nmodel:\n  max_model_len: 100\n"
        "gateway:\n  port: 5555\n  host: 0.0.0.0\nflower:\n  host: 0.0.0.0\n"
    )
    faults = faults_of(text, tmp_path)
    assert any("kv.block_size: 3 is not a power of two" in fault for fault in faults)
    assert any("needs 34 blocks of 3, and a worker has 2" in fault for fault in faults)
    assert any("5555 is the gateway's port, too" in fault for fault in faults)
    assert any("flower.basic_auth" in fault for fault in faults)


def test_tls_needs_its_files_and_files_need_tls(tmp_path: Path) -> None:
    faults = faults_of("transfer:\n  tls: on\n  tls_key: node.key\n", tmp_path)
    assert [fault.count("transfer.tls is on") for fault in faults] == [1, 1]
    assert any("transfer.tls_certificate" in fault for fault in faults)
    assert any("transfer.tls_ca" in fault for fault in faults)
    (fault,) = faults_of("transfer:\n  tls_ca: ca.pem\n", tmp_path)
    assert "transfer.tls_ca" in fault
    assert "would not be used" in fault


def test_listening_everywhere_needs_an_address_that_peers_can_dial(tmp_path: Path) -> None:
    (fault,) = faults_of("transfer:\n  bind_host: 0.0.0.0\n", tmp_path)
    assert "transfer.advertise_host" in fault
    assert "0.0.0.0" in fault

    file = tmp_path / "right.yaml"
    file.write_text("transfer:\n  bind_host: 0.0.0.0\n  advertise_host: 10.1.2.3\n")
    assert configs.load(file, env={"HOME": str(tmp_path)}).transfer.advertise_host == "10.1.2.3"
