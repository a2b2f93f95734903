"""The engine process, seen from the front: start it, talk to it, notice its death. No torch here.

One spawned (never forked) child owns the device, the weights, the KV region and the scheduler, because the GIL of the
front must not stretch a step. Front and child speak `engines.messages` over a socketpair: EOF on it is death, believed
at once by either side. The first frame is the `EngineConfig`, so that no secret stands in an argument list.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from dataclasses import dataclass

import msgspec

from configs.schema import Settings
from engines.messages import FRAME_HEADER

SPIN_COUNT = "30000"  # some 0.1 ms: longer than the parts of a small step, far shorter than an idle moment
SOCKET_BUFFER_BYTES = 4 << 20  # a front that waits a second for Redis must not stop the engine


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All an engine process is told at its start."""

    settings: Settings
    role: str  # prefill | decode | both
    node: str
    incarnation: str
    secret: bytes
    cpus: tuple[int, ...] = ()
    gpu: str | None = None


@dataclass
class EngineChild:
    """A running engine process. `sock` is non-inheritable and blocking; the front's output thread owns it."""

    process: subprocess.Popen[bytes]
    sock: socket.socket

    @property
    def pid(self) -> int:
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.poll()

    def wait(self, timeout: float | None = None) -> int:
        return self.process.wait(timeout)

    def terminate(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()

    def close(self) -> None:
        """Close our end: the child sees EOF and leaves."""
        self.sock.close()


def spawn_engine(
    settings: Settings,
    *,
    role: str,
    node: str,
    incarnation: str,
    secret: bytes,
    cpus: tuple[int, ...] = (),
    gpu: str | None = None,
) -> EngineChild:
    """Start the engine of one worker. Returns at once; `Ready` comes over the socket when the weights are loaded.

    Call it from the main thread: the child's death signal (PR_SET_PDEATHSIG) is tied to the thread that made it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for sock in (ours, theirs):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
    process = subprocess.Popen(
        [sys.executable, "-m", "engines.engine_main", str(theirs.fileno()), str(os.getpid())],
        pass_fds=(theirs.fileno(),),
        stdin=subprocess.DEVNULL,
        env=_environment(cpus, gpu),
    )
    theirs.close()
    config = EngineConfig(
        settings=settings, role=role, node=node, incarnation=incarnation, secret=secret, cpus=cpus, gpu=gpu
    )
    body = msgspec.msgpack.encode(config)
    with contextlib.suppress(OSError):  # it died at once: the caller sees EOF
        ours.sendall(FRAME_HEADER.pack(len(body)) + body)
    return EngineChild(process, ours)


def _environment(cpus: tuple[int, ...], gpu: str | None) -> dict[str, str]:
    env = dict(os.environ)
    # Threads that spin between two parallel regions take the cores that the other workers of this host compute on.
    env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    env.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if cpus:
        env["OMP_NUM_THREADS"] = str(len(cpus))
    if len(cpus) > 1:
        # On cores of its own: a thread that sleeps at each of a step's 240 barriers is woken too late, 30 us each time.
        env.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if gpu is not None:
        env["CUDA_VISIBLE_DEVICES"] = gpu
    return env
