"""Real Celery workers with a fake engine, the real state store, the real broker: what becomes of requests and tasks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from configs.schema import Settings
from engines.params import SamplingParams
from kvstore.state import EmbeddedValkey, StateStore
from kvstore.state.records import NewRequest, Record
from kvstore.state.transitions import FINAL_STATES, RequestState
from tasks.reaper import Reaper
from tasks.wakeups import WakeupSender
from tests.fakes import fake_output

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny-chat"
START_S = 90.0  # many times what anything here takes, for a machine that has much else to do
PROMPT = [301, 302, 303]


class Workers:
    """A state server, a broker, and as many workers as a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = EmbeddedValkey(folder / "valkey")
        url = self.server.start()
        self.settings = Settings(run_dir=str(folder))
        self.settings.model.path = str(ROOT / "models" / MODEL)
        self.settings.state.broker_url = url
        self.settings.state.state_url = url.replace("/0", "/1")
        self.settings.state.visibility_timeout_s = 8
        self.store = StateStore(self.settings.state.state_url)
        self.sender = WakeupSender(self.settings)
        self.app = self.sender._app
        self.processes: list[subprocess.Popen[bytes]] = []
        self.reaper: Reaper | None = None

    def start(
        self, name: str, queue: str, *args: str, step_s: float = 0.01, wait: bool = True
    ) -> subprocess.Popen[bytes]:
        env = {
            **os.environ,
            "FAKE_SETTINGS": msgspec.msgpack.encode(self.settings).hex(),
            "FAKE_STEP_S": str(step_s),
            "FAKE_RUN_DIR": str(self.folder),
            "OMP_NUM_THREADS": "1",
        }
        log = (self.folder / f"{name}.log").open("ab")
        program = "from tests.fakes import run_worker_program as run; run()"
        options = ["-Q", queue, "-n", f"{name}@test", "--without-gossip", "--without-mingle", "-l", "INFO", *args]
        process = subprocess.Popen([sys.executable, "-c", program, *options], cwd=ROOT, env=env, stdout=log, stderr=log)
        self.processes.append(process)
        if wait:
            self.wait(lambda: any(beat.node == f"{name}@test" for beat in self.store.workers()), f"{name} is ready")
        return process

    def start_pair(self, **kwargs: Any) -> list[subprocess.Popen[bytes]]:
        pair = [
            self.start("d0", f"decode.{MODEL}", wait=False, **kwargs),
            self.start("p0", f"prefill.{MODEL}", wait=False, **kwargs),
        ]
        self.wait(lambda: {beat.role for beat in self.store.workers()} == {"prefill", "decode"}, "both are ready")
        return pair

    def start_reaper(self) -> None:
        self.reaper = Reaper(self.settings, self.store, self.sender)
        self.reaper.start()

    def submit(self, *, max_tokens: int = 10, deadline_s: float = 60.0, k: int = 1, **params: Any) -> str:
        rid = self.store.new_request_id()
        sampling = SamplingParams(n=k, max_tokens=max_tokens, temperature=0.0, **params)
        accepted = self.store.accept(
            NewRequest(
                rid=rid, model=MODEL, tenant="t", priority=0, deadline_in_s=deadline_s, seed=1, k=k,
                params=msgspec.msgpack.encode(sampling), prompt_ids=PROMPT, gateway="g0", body_hash=rid,
            )
        )  # fmt: skip
        self.sender.send(accepted.turns, self.store)
        return rid

    def record(self, rid: str) -> Record:
        record = self.store.record(rid)
        assert record is not None
        return record

    def wait(self, claim: Callable[[], object], what: str, timeout_s: float = START_S) -> None:
        end = time.monotonic() + timeout_s
        while not claim():
            assert time.monotonic() < end, f"not within {timeout_s} s: {what}\n{self.logs()}"
            time.sleep(0.05)

    def wait_final(self, *rids: str, timeout_s: float = START_S) -> None:
        for rid in rids:
            self.wait(lambda rid=rid: self.record(rid).state in FINAL_STATES, f"{rid} ends", timeout_s)  # type: ignore[misc]

    def ids(self, rid: str, c: int = 0) -> list[int]:
        log = self.store.read_log(rid, c, 0)
        indices = [entry.index for entry in log.entries]
        assert indices == sorted(set(indices)), "an entry twice"
        return [token_id for entry in log.entries for token_id in entry.token_ids]

    def inspect(self, name: str, what: str) -> Any:
        inspector = self.app.control.inspect(destination=[f"{name}@test"], timeout=15, limit=1)
        try:
            reply = getattr(inspector, what)()
        except redis.ConnectionError:  # a test killed this connection, too
            reply = getattr(inspector, what)()
        assert reply, f"{name} did not answer {what}\n{self.logs()}"
        return reply[f"{name}@test"]

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-4000:]}" for path in self.folder.glob("*.log"))

    def close(self) -> None:
        if self.reaper is not None:
            self.reaper.stop()
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.kill()
            process.wait(10)
        self.store.close()
        self.server.stop()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    cluster = Workers(tmp_path)
    try:
        yield cluster
    finally:
        cluster.close()


def test_a_request_goes_through_prefill_and_decode_to_its_end(workers: Workers) -> None:
    workers.start_pair()

    rid = workers.submit(max_tokens=20)
    workers.wait_final(rid)

    assert workers.record(rid).state is RequestState.FINISHED
    assert workers.ids(rid) == fake_output(PROMPT, 20)
    fin = workers.store.read_log(rid, 0, 20).fin
    assert fin is not None and (fin.state, fin.reason) == ("FINISHED", "length")


def test_events_tell_the_true_run_times_of_both_tasks(workers: Workers) -> None:
    workers.start_pair(step_s=0.02)
    events: dict[str, dict[str, Any]] = {}
    rids: list[str] = []
    submitted_s: list[float] = []
    end = time.monotonic() + START_S

    def take(event: dict[str, Any]) -> None:
        if not rids:  # the first heartbeat, which `wakeup` asks for: from here on no event is missed
            rids.append(workers.submit(max_tokens=50))
            submitted_s.append(time.monotonic())
        events[f"{event['type']} {event.get('uuid')}"] = event
        num_done = sum(name.startswith("task-succeeded") for name in events)
        receiver.should_stop = num_done == 2 or time.monotonic() > end

    with workers.app.connection_for_read() as connection:
        receiver = workers.app.events.Receiver(connection, handlers={"*": take})
        receiver.capture(timeout=5, limit=None, wakeup=True)

    taken_s = time.monotonic() - submitted_s[0]
    (rid,) = rids
    wake_n = workers.record(rid).wake_n
    runtimes = {stage: events[f"task-succeeded {rid}.{stage}.{wake_n}"]["runtime"] for stage in ("prefill", "decode")}
    assert f"task-started {rid}.decode.{wake_n}" in events
    assert 0 < runtimes["prefill"] < runtimes["decode"] / 2
    assert 0.9 < runtimes["decode"] < taken_s


def test_many_requests_are_live_at_once_and_all_leave(workers: Workers) -> None:
    workers.start_pair(step_s=0.03)

    rids = [workers.submit(max_tokens=40, k=1 + i % 2) for i in range(40)]
    workers.wait(lambda: len(workers.inspect("d0", "active")) > 5, "many decode tasks are active at once")
    workers.wait_final(*rids)

    for rid in rids:
        for c in range(len(workers.record(rid).n)):
            assert workers.ids(rid, c) == fake_output(PROMPT, 40, c)
    for name in ("p0", "d0"):
        workers.wait(lambda name=name: workers.inspect(name, "stats")["pool"]["tasks"] == 0, "no task left")  # type: ignore[misc]
        assert workers.inspect(name, "stats")["pool"]["live"] == 0


def test_a_worker_of_role_both_does_it_alone(workers: Workers) -> None:
    workers.start("b0", f"generate.{MODEL}")

    rid = workers.submit(max_tokens=15, k=2)
    workers.wait_final(rid)

    assert [workers.ids(rid, c) for c in range(2)] == [fake_output(PROMPT, 15, c) for c in range(2)]


def test_revoke_with_terminate_cancels_the_request_everywhere(workers: Workers) -> None:
    workers.start_pair(step_s=0.05)
    rid = workers.submit(max_tokens=1000)
    workers.wait(lambda: workers.record(rid).state is RequestState.DECODING, "it decodes")
    workers.wait(lambda: workers.inspect("d0", "active"), "its decode task is active")

    workers.sender.revoke([workers.inspect("d0", "active")[0]["id"]])
    workers.wait_final(rid)

    assert workers.record(rid).state is RequestState.CANCELLED
    workers.wait(lambda: workers.inspect("d0", "stats")["pool"]["blocks"]["used"] == 0, "its blocks are free")


def test_an_engine_that_dies_costs_no_token(workers: Workers) -> None:
    workers.start_reaper()
    decode, prefill = workers.start_pair(step_s=0.02)
    for victim in (decode, prefill):
        rids = [workers.submit(max_tokens=80) for _ in range(5)]
        workers.wait(lambda rids=rids: all(workers.record(rid).n[0] > 5 for rid in rids), "they run")  # type: ignore[misc]

        os.kill(victim.pid, signal.SIGUSR2)
        more = [workers.submit(max_tokens=10) for _ in range(3)]
        workers.wait_final(*rids, *more)

        assert all(workers.ids(rid) == fake_output(PROMPT, 80) for rid in rids)
        assert all(workers.ids(rid) == fake_output(PROMPT, 10) for rid in more)
    assert [workers.inspect(name, "stats")["pool"]["engine_deaths"] for name in ("d0", "p0")] == [1, 1]


def test_a_killed_worker_is_replaced_and_its_requests_go_on(workers: Workers) -> None:
    workers.start_reaper()
    decode, _ = workers.start_pair(step_s=0.02)
    rids = [workers.submit(max_tokens=80) for _ in range(5)]
    workers.wait(lambda: all(workers.record(rid).n[0] > 5 for rid in rids), "they run")

    decode.kill()
    decode.wait(5)
    workers.start("d0", f"decode.{MODEL}", step_s=0.02, wait=False)
    workers.wait_final(*rids)

    assert all(workers.ids(rid) == fake_output(PROMPT, 80) for rid in rids)
    assert all(workers.record(rid).state is RequestState.FINISHED for rid in rids)


def test_a_killed_server_costs_no_token(workers: Workers) -> None:
    workers.start_reaper()
    workers.start_pair(step_s=0.03)
    rids = [workers.submit(max_tokens=100) for _ in range(5)]
    workers.wait(lambda: all(workers.record(rid).n[0] > 5 for rid in rids), "they run")
    time.sleep(1.1)  # the append-only file is synced each second

    os.kill(workers.server.pid, signal.SIGKILL)
    time.sleep(0.7)
    workers.server.start()
    workers.wait_final(*rids)

    assert all(workers.ids(rid) == fake_output(PROMPT, 100) for rid in rids)
    assert all(workers.record(rid).attempts == 1 for rid in rids)
    rid = workers.submit(max_tokens=10)
    workers.wait_final(rid)
    for name in ("p0", "d0"):
        workers.wait(lambda name=name: workers.inspect(name, "stats")["pool"]["tasks"] == 0, "no task left")  # type: ignore[misc]


def test_messages_that_the_broker_delivers_again_are_adopted(workers: Workers) -> None:
    workers.start_pair(step_s=0.05)
    rid = workers.submit(max_tokens=100)
    workers.wait(lambda: workers.inspect("d0", "active"), "it decodes")

    with redis.Redis.from_url(workers.settings.state.broker_url) as client:
        client.execute_command("CLIENT", "KILL", "TYPE", "normal")
    workers.wait_final(rid)

    assert workers.ids(rid) == fake_output(PROMPT, 100)
    assert workers.record(rid).attempts == 1
    for name in ("p0", "d0"):
        workers.wait(lambda name=name: workers.inspect(name, "stats")["pool"]["tasks"] == 0, "no task left")  # type: ignore[misc]


def test_warm_shutdown_finishes_what_is_live(workers: Workers) -> None:
    decode, prefill = workers.start_pair(step_s=0.02)
    rids = [workers.submit(max_tokens=120) for _ in range(5)]
    workers.wait(lambda: all(workers.record(rid).state is RequestState.DECODING for rid in rids), "they decode")

    for process in (prefill, decode):
        process.send_signal(signal.SIGTERM)
    workers.wait_final(*rids)

    assert prefill.wait(60) == 0
    assert decode.wait(60) == 0
    assert all(workers.ids(rid) == fake_output(PROMPT, 120) for rid in rids)
    assert workers.store.workers() == []


def test_drain_hands_back_at_the_deadline_and_the_worker_leaves(workers: Workers) -> None:
    workers.start_pair(step_s=0.05)
    rid = workers.submit(max_tokens=200)
    workers.wait(lambda: workers.record(rid).n[0] > 3, "it runs")
    workers.start("d1", f"decode.{MODEL}", step_s=0.002)

    workers.app.control.broadcast("drain", arguments={"deadline": 0.5}, destination=["d0@test"], reply=True, timeout=15)
    workers.wait_final(rid)

    assert workers.processes[0].wait(60) == 0
    assert workers.ids(rid) == fake_output(PROMPT, 200)


def test_a_second_worker_on_the_same_gpu_is_refused(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(workers.folder))
    workers.start("d0", f"decode.{MODEL}", "--gpu", "7")

    second = workers.start("d1", f"decode.{MODEL}", "--gpu", "7", wait=False)

    assert second.wait(START_S) != 0
    assert "GPU 7 is already pinned" in workers.logs()
    workers.start("d2", f"decode.{MODEL}", "--gpu", "7", "--share-gpu")


@pytest.mark.parametrize("pool", ["solo", "threads"])
def test_a_pool_without_an_engine_is_refused_with_the_reason(workers: Workers, pool: str) -> None:
    process = workers.start("p0", f"prefill.{MODEL}", "-P", pool, wait=False)

    assert process.wait(START_S) != 0
    assert "has no engine" in workers.logs()


def test_pool_shrink_and_grow_change_the_live_slots(workers: Workers) -> None:
    workers.start("b0", f"generate.{MODEL}", "-c", "8", step_s=0.05)
    workers.app.control.pool_shrink(6, destination=["b0@test"], reply=True, timeout=15)

    rids = [workers.submit(max_tokens=40) for _ in range(6)]  # 2 s each: time enough to see two of them
    workers.wait(lambda: workers.inspect("b0", "stats")["pool"]["live"] == 2, "two are live")
    workers.app.control.pool_grow(4, destination=["b0@test"], reply=True, timeout=15)
    workers.wait(lambda: workers.inspect("b0", "stats")["pool"]["slots"] == 6, "slots grew")

    workers.wait_final(*rids)


def test_nothing_of_the_front_imports_torch() -> None:
    code = (
        "import configs; from configs.schema import Settings; vars(configs).update(load=lambda: Settings())\n"
        "import sys, tasks.app, tasks.pool, tasks.front, tasks.reaper\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )

    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )

    assert result.stdout.strip() == "[]"
