"""The state server in trouble: damaged keys, lost functions, silence, no memory, restarts."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from kvstore.errors import BadRecord, ServerNotStarted, StateUnavailable
from kvstore.state import Accepted, Cancelled, EmbeddedValkey, Gone, Ok, RenewItem, RequestState, StateStore
from kvstore.state.keys import log_key, record_key
from kvstore.state.library import production
from tests.conftest import ClockedStore
from tests.contract.state_requests import DEADLINE_S, Owned, accepted, claimed, item, make_request, state_of
from tests.stopwatch import Stopwatch


def test_record_of_another_type_harms_only_itself(clocked: ClockedStore) -> None:
    store = clocked.store
    good = accepted(store)
    epoch = claimed(store, good, "w-1.1").epoch
    bad = accepted(store)
    clocked.raw.delete(record_key(bad))
    clocked.raw.set(record_key(bad), "somebody else's")

    replies = store.append_batch(
        [item(Owned(bad, 2, "w-1.2", "PREFILLING"), [7]), item(Owned(good, epoch, "w-1.1", "PREFILLING"), [7])]
    )

    assert isinstance(replies[0], Gone)
    assert "is no hash" in replies[0].bad_record
    assert replies[1] == Ok()
    for call in (lambda: store.claim(bad, "w-1.2"), lambda: store.attach(bad, "gw-1"), lambda: store.record(bad)):
        with pytest.raises(BadRecord) as error:
            call()
        assert error.value.rid == bad


@pytest.mark.parametrize(
    ("field", "value"),
    [("schema", "2"), ("state", "SLEEPING"), ("epoch", "many"), ("deadline", ""), ("k", "x"), ("prompt_ids", "\xc1")],
)
def test_garbled_field_is_named(clocked: ClockedStore, field: str, value: str) -> None:
    rid = accepted(clocked.store)
    clocked.raw.hset(record_key(rid), field, value.encode("latin-1"))

    with pytest.raises(BadRecord):
        clocked.store.claim(rid, "w-1.1")


def test_reaper_puts_an_unreadable_record_aside_and_goes_on(clocked: ClockedStore) -> None:
    bad, good = accepted(clocked.store), accepted(clocked.store)
    clocked.raw.hset(record_key(bad), "state", "SLEEPING")
    clocked.advance(1.1)

    turns = clocked.store.reap(0, idle=True).turns

    assert [turn.rid for turn in turns] == [good]
    ((_, entry),) = clocked.raw.xrange("cel:{s00}:quarantine")
    assert entry == {b"rid": bad.encode(), b"why": b"state SLEEPING"}
    assert clocked.raw.hget(record_key(bad), "state") == b"SLEEPING", "kept for whoever looks"


def test_record_of_a_newer_version_is_left_alone(clocked: ClockedStore) -> None:
    rid = accepted(clocked.store)
    clocked.raw.hset(record_key(rid), "schema", "2")
    before = clocked.raw.hgetall(record_key(rid))
    clocked.advance(2 * DEADLINE_S)

    assert clocked.store.reap(0, idle=True).turns == []
    assert clocked.raw.hgetall(record_key(rid)) == before
    assert clocked.raw.zrange("cel:{s00}:live", 0, -1) == [rid.encode()]
    assert clocked.raw.zrange("cel:{s00}:dispatched", 0, -1) == [rid.encode()]


def test_garbled_log_fails_its_reader_with_the_request_named(clocked: ClockedStore) -> None:
    rid = accepted(clocked.store)
    clocked.raw.xadd(log_key(rid, 0), {"t": b"\xc1"}, id="1-0")

    with pytest.raises(BadRecord, match=rid):
        clocked.store.read_log(rid, 0, 0)


def test_log_of_another_type_is_not_written_halfway(clocked: ClockedStore) -> None:
    rid = accepted(clocked.store)
    epoch = claimed(clocked.store, rid, "w-1.1").epoch
    clocked.raw.set(log_key(rid, 0), "x")

    (reply,) = clocked.store.append_batch([item(Owned(rid, epoch, "w-1.1", "PREFILLING"), [7])])

    assert isinstance(reply, Gone)
    record = clocked.store.record(rid)
    assert record is not None
    assert record.n == [0]


def test_functions_lost_are_loaded_again_by_the_next_call(state_store: StateStore, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as raw:
        raw.execute_command("FUNCTION", "FLUSH")  # type: ignore[no-untyped-call]

    assert state_store.accept(make_request()).status == "OK"


def test_functions_outlive_flushall_and_records_do_not(state_store: StateStore, redis_url: str) -> None:
    rid = accepted(state_store)
    epoch = claimed(state_store, rid, "w-1.1").epoch
    with redis.Redis.from_url(redis_url) as raw:
        raw.flushall()

    held = RenewItem(rid, epoch, "w-1.1", "PREFILLING")
    assert state_store.renew([held]) == [(held, Gone())]


def test_older_build_of_the_functions_is_replaced_and_a_newer_one_is_not(redis_url: str) -> None:
    store = StateStore(redis_url)
    ours = production().source
    with redis.Redis.from_url(redis_url, protocol=2) as raw:

        def loaded_build() -> bool:
            listing = raw.execute_command("FUNCTION", "LIST", "WITHCODE")  # type: ignore[no-untyped-call]
            return "local BUILD = 999" in str(listing)

        for build, kept in ((0, False), (999, True)):
            other = ours.replace(f"local BUILD = {production().build}\n", f"local BUILD = {build}\n")
            raw.execute_command("FUNCTION", "LOAD", "REPLACE", other)  # type: ignore[no-untyped-call]
            store.load_library()
            assert loaded_build() is kept
        raw.execute_command("FUNCTION", "FLUSH")  # type: ignore[no-untyped-call]


def test_server_that_rests_is_unavailable_within_the_timeout(valkey_server: EmbeddedValkey, redis_url: str) -> None:
    store = StateStore(redis_url, timeout_s=0.2)
    store.load_library()
    request = make_request()
    os.kill(valkey_server.pid, signal.SIGSTOP)
    try:
        with Stopwatch() as watch, pytest.raises(StateUnavailable) as error:
            store.accept(request)
    finally:
        os.kill(valkey_server.pid, signal.SIGCONT)
    watch.assert_within(0.55)
    assert (error.value.reason, error.value.retryable) == ("timeout", True)

    # Whether it ran is unknown; the same call again is right in both cases.
    assert store.accept(request).status in ("OK", "EXISTS")


def test_full_server_takes_nothing_new_but_ends_what_runs(state_store: StateStore, redis_url: str) -> None:
    rid = accepted(state_store)
    with redis.Redis.from_url(redis_url) as raw:
        raw.config_set("maxmemory", 1)
        try:
            with pytest.raises(StateUnavailable):
                state_store.accept(make_request())
            assert isinstance(state_store.cancel(rid, "user"), Cancelled)
        finally:
            raw.config_set("maxmemory", 0)


def test_nobody_listening_is_unavailable() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        store = StateStore(f"redis://127.0.0.1:{reserved.getsockname()[1]}/0", timeout_s=0.2)
        with pytest.raises(StateUnavailable) as error:
            store.ping()
    assert error.value.reason == "connection"


def test_many_threads_share_one_store(state_store: StateStore) -> None:
    replies: list[Accepted] = []
    threads = [
        threading.Thread(target=lambda: replies.extend(state_store.accept(make_request()) for _ in range(20)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert [reply.status for reply in replies] == ["OK"] * 160
    assert state_store.count_by_state()["QUEUED"] == 160


# ---------------------------------------------------------------- the embedded server
def test_embedded_server_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    url = server.start()
    try:
        rid = accepted(StateStore(url))
        server.stop()
        assert server.pid == 0

        assert server.start() == url
        assert state_of(StateStore(url), rid) is RequestState.QUEUED
    finally:
        server.stop()


def test_store_goes_on_after_the_server_was_killed_and_started_again(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    store = StateStore(server.start())
    try:
        rid = accepted(store)
        time.sleep(1.2)  # the server writes its file each second
        os.kill(server.pid, signal.SIGKILL)
        while server.pid:
            time.sleep(0.01)
        with pytest.raises(StateUnavailable):
            store.record(rid)

        server.start()
        assert claimed(store, rid, "w-1.1").epoch == 2
    finally:
        server.stop()


def test_embedded_server_ends_with_its_parent(tmp_path: Path) -> None:
    program = (
        "import sys, time; from kvstore.state import EmbeddedValkey; server = EmbeddedValkey(sys.argv[1]);"
        " server.start(); print(server.pid, server.port, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid, _port = map(int, parent.stdout.readline().split())
    parent.kill()
    parent.wait(5)

    gone_by = time.monotonic() + 5
    while _runs(pid) and time.monotonic() < gone_by:
        time.sleep(0.02)
    assert not _runs(pid)


def test_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServerNotStarted) as error:
            EmbeddedValkey(tmp_path, port=taken.getsockname()[1]).start()
    assert "in use" in error.value.log_tail


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
