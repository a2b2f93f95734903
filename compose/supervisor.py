"""The process behind `celeriac up`: starts the parts of a local cluster, watches them, ends them in order.

    start   state server -> all processes at once -> gates: workers, gateway, Flower
    watch   a dead process starts again with back-off; a dead worker is evicted first; the state server, too, starts
            again, on the same port and folder
    drain   gateway (no new calls) -> workers (finish what they have) -> Flower -> state server
            a second signal hurries, a third kills

One thread: the kernel ties a child's death signal to the thread that started it. So when this process is killed, every
other one ends.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from compose.child import Child, ChildState, exit_text
from compose.errors import ComposeError, StartFailed
from compose.layout import ClusterPlan
from compose.readiness import flower_url, gateway_url, is_ready
from compose.run_folder import RunFolder
from compose.worker_watch import WorkerWatch
from configs.schema import Settings
from kvstore.clock import now_s
from kvstore.errors import KVStoreError
from kvstore.readable import wait_readable
from kvstore.state.embedded import EmbeddedValkey
from kvstore.state.store import StateStore

_log = logging.getLogger(__name__)

Report = Callable[[str], None]
TICK_S = 0.25
GATE_TICK_S = 0.1
GATEWAY_START_S = 60.0
GATEWAY_END_S = 15.0
FLOWER_END_S = 5.0
WORKER_END_MARGIN_S = 10.0
HURRIED_END_S = 3.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """A signal came while the cluster was starting."""


class Supervisor:
    """One cluster. Owned by the main thread."""

    def __init__(
        self,
        settings: Settings,
        plan: ClusterPlan,
        folder: RunFolder,
        *,
        valkey: EmbeddedValkey | None,
        redis_pid: int,
        report: Report,
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._valkey = valkey
        self._redis_pid = redis_pid
        self._report = report
        self._valkey_retry_s = 0.0
        self.children = [Child(spec, folder.log_path(spec.name), now_s) for spec in plan.children]
        self._store = StateStore(settings.state.state_url, num_shards=settings.state.num_shards)
        self._watch = WorkerWatch(settings, self._store, now_s)
        self._num_stops = 0
        self._phase = "starting"
        self._written: dict[str, Any] = {}
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # ------------------------------------------------------------------ the three acts
    def run(self, ready: Callable[[], None]) -> None:
        """Until a signal. `ready` is called when every gate is open.

        Raises:
            StartFailed: a process died, or was not ready in time. Everything that ran is ended.
        """
        self._listen()
        try:
            self._start()
            self._phase = "ready"
            self._tick()
            ready()
            while not self._num_stops:
                self._rest(TICK_S)
                self._tick()
        except Stopped:
            self._report("stopped before it was ready")
        finally:
            self._drain()

    def _start(self) -> None:
        self._store.load_library()
        for child in self.children:
            child.spawn()
        self._write_state()
        for kind, limit_s in (
            ("worker", self._settings.worker.engine_start_timeout_s),
            ("gateway", GATEWAY_START_S),
            ("flower", GATEWAY_START_S),
        ):
            self._gate([child for child in self.children if child.spec.kind == kind], limit_s)

    def _gate(self, waited_for: Sequence[Child], limit_s: float) -> None:
        end_s = now_s() + limit_s
        while waiting := [child for child in waited_for if child.state is not ChildState.READY]:
            if self._num_stops:
                raise Stopped
            self._watch.poll()
            self._keep_valkey()
            for child in self.children:
                death = child.poll_death()
                if death is not None:
                    raise self._failed(child, f"ended with {exit_text(death[1])} while the cluster was starting")
            for child in waiting:
                if self._look(child):
                    self._report(f"{child.spec.name}: ready{_place(child)}")
            if now_s() >= end_s:
                raise self._failed(waiting[0], f"was not ready within {limit_s:g} s")
            self._write_state()
            self._rest(GATE_TICK_S)

    def _failed(self, child: Child, what: str) -> StartFailed:
        name = child.spec.name
        return StartFailed(name, what, self._folder.log_path(name), self._folder.log_tail(name))

    def _tick(self) -> None:
        self._keep_valkey()
        self._watch.poll(own_pids=[child.pid for child in self.children if child.spec.kind == "worker"])
        for child in self.children:
            death = child.poll_death()
            if death is not None:
                self._bury(child, *death)
            if child.is_due:
                child.spawn()
            if child.state is ChildState.STARTING and self._look(child):
                self._report(f"{child.spec.name}: ready again")
        self._write_state()

    def _look(self, child: Child) -> bool:
        if not is_ready(child.spec, child.pid, self._watch.beats, self._settings):
            return False
        child.became_ready()
        return True

    def _bury(self, child: Child, pid: int, status: int) -> None:
        wait_s = max(0.0, child.restart_at_s - now_s())
        when = f"in {wait_s:.1f} s" if wait_s else "now"
        self._report(f"{child.spec.name}: process {pid} ended with {exit_text(status)}, starting again {when}")
        if child.spec.kind == "worker":
            self._watch.died(pid)

    def _keep_valkey(self) -> None:
        """The embedded server is ours to start again; an external one is not."""
        if self._valkey is None or self._valkey.pid or now_s() < self._valkey_retry_s:
            return
        self._report("valkey: ended, starting again on the same port")
        try:
            self._valkey.start()
        except KVStoreError as error:
            self._valkey_retry_s = now_s() + 1.0
            self._report(f"valkey: {error}")

    # ------------------------------------------------------------------ the end
    def _drain(self) -> None:
        self._phase = "draining"
        self._write_state()
        drain_s = self._settings.worker.drain_timeout_s
        self._end("gateway", GATEWAY_END_S)
        self._end("worker", drain_s + WORKER_END_MARGIN_S)
        self._end("flower", FLOWER_END_S)
        self._store.close()
        if self._valkey is not None:
            self._valkey.stop()
        self._report("stopped")

    def _end(self, kind: str, limit_s: float) -> None:
        """SIGTERM, then wait; a further signal to us turns to SIGQUIT, the next to SIGKILL."""
        ending = [child for child in self.children if child.spec.kind == kind]
        for child in ending:
            child.signal(signal.SIGTERM)
        end_s, is_hurried = now_s() + limit_s, False
        while any(child.is_alive for child in ending) and now_s() < end_s and self._num_stops < 3:
            if self._num_stops >= 2 and not is_hurried:
                is_hurried, end_s = True, min(end_s, now_s() + HURRIED_END_S)
                for child in ending:
                    child.signal(signal.SIGQUIT)
            self._rest(GATE_TICK_S)
        for child in ending:
            child.end(kill=True)

    # ------------------------------------------------------------------ signals, state
    def _listen(self) -> None:
        """Handlers only write to a pipe that `_rest` waits on; SIGCHLD so that a death is seen at once."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)

    def _stop(self, *_: object) -> None:
        self._num_stops += 1

    def _rest(self, seconds: float) -> None:
        wait_readable([self._wake_read], seconds)
        try:
            while os.read(self._wake_read, 512):
                pass
        except BlockingIOError:
            pass

    def _write_state(self) -> None:
        state = self.describe()
        if state != self._written:
            self._folder.write_state(state)
            self._written = state

    def describe(self) -> dict[str, Any]:
        """What `status` shows, as far as the supervisor knows."""
        pids = {child.spec.name: child.pid for child in self.children}
        redis_pid = self._valkey.pid if self._valkey is not None else self._redis_pid
        return {
            "phase": self._phase,
            "supervisor_pid": os.getpid(),
            "started_at": self._written.get("started_at", round(time.time(), 3)),
            "redis": {"url": self._settings.state.broker_url, "pid": redis_pid},
            "gateway": [{"pid": pids["gateway"], "url": gateway_url(self._settings)}],
            "flower": {"pid": pids["flower"], "url": flower_url(self._settings)} if "flower" in pids else {},
            "workers": [self._describe_worker(child) for child in self.children if child.spec.kind == "worker"],
        }

    def _describe_worker(self, child: Child) -> dict[str, Any]:
        beat = self._watch.beats.get(child.pid)
        is_draining = self._phase == "draining" or (beat is not None and beat.draining)
        return {
            "node": child.spec.node,
            "role": child.spec.role,
            "pid": child.pid,
            "engine_pids": list(beat.engine_pids) if beat else [],
            "incarnation": beat.incarnation if beat else "",
            "state": "draining" if is_draining and child.is_alive else child.state.value,
            "cpus": list(child.spec.cpus),
            "num_restarts": child.backoff.num_restarts,
        }


def _place(child: Child) -> str:
    cpus = child.spec.cpus
    return f" (pid {child.pid}, cores {','.join(map(str, cpus))})" if cpus else f" (pid {child.pid})"


__all__ = ["ComposeError", "Report", "Supervisor"]
