"""What runs in the engine process: build the engine, then alternate between messages and steps until EOF.

Threads: `engine` (the main thread: messages, decisions, forward passes) and `kv` (transport progress).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time

import msgspec

from engines.core import EngineCore
from engines.messages import EngineMessage, FrameReader, Ready, Shutdown, decode_front, frame
from engines.parent import end_with
from engines.process import SOCKET_BUFFER_BYTES, EngineConfig
from engines.step_timer import OFF, StepTimer
from kvstore import transport as kv
from kvstore.clock import now_s

READ_BYTES = 1 << 20


class FrontLink:
    """Our end of the socketpair. Owned by the engine thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        self.sock = sock
        self._reader = FrameReader()
        self._frames: list[bytes] = []

    def send(self, message: EngineMessage) -> None:
        self.sock.sendall(frame(message))

    def read_config(self) -> EngineConfig:
        while not self._frames:
            self._frames += self._reader.feed(self._receive())
        return msgspec.msgpack.decode(self._frames.pop(0), type=EngineConfig)

    def frames(self) -> list[bytes]:
        """Frames that are there; reads once, so call it when the socket is readable or frames are left."""
        frames, self._frames = self._frames, []
        return frames + self._reader.feed(self._receive())

    def _receive(self) -> bytes:
        chunk = self.sock.recv(READ_BYTES)
        if not chunk:
            raise EOFError("the front is gone")
        return chunk


def run_loop(link: FrontLink, node: kv.KVPort, core: EngineCore, timer: StepTimer = OFF) -> None:
    """Until `Shutdown` or EOF. Between two steps everything that came is handled; without work it waits in poll."""
    poller = select.poll()
    poller.register(link.sock, select.POLLIN)
    poller.register(node.wake_fd, select.POLLIN)
    is_busy = False
    while True:
        wait_s = 0.0 if is_busy else max(core.next_wakeup_s() - now_s(), 0.0)
        ready = poller.poll(min(wait_s, 1.0) * 1e3)
        if is_busy:
            timer.split("poll")
        else:
            timer.reset()  # it waited for work; that belongs to no step
        for fd, _ in ready:
            if fd == link.sock.fileno():
                for body in link.frames():
                    message = decode_front(body)
                    if isinstance(message, Shutdown):
                        return
                    core.handle(message)
        timer.split("front_messages")
        for event in node.poll_events():
            core.handle_kv(event)
        timer.split("kv_events")
        is_busy = core.step()


def main() -> None:
    sock_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    end_with(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the front's business: it drains first
    link = FrontLink(socket.socket(fileno=sock_fd))
    config = link.read_config()
    if config.cpus:
        os.sched_setaffinity(0, config.cpus)
    started_s = time.monotonic()

    from engines.build import build_engine  # imports torch: after the affinity is set

    engine = build_engine(config, link.send)
    link.send(
        Ready(
            pid=os.getpid(),
            address=engine.address,
            num_blocks=engine.num_blocks,
            block_size=engine.block_size,
            max_model_len=engine.max_model_len,
            dtype=engine.dtype,
            device=engine.device,
            visible_device=os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            num_threads=engine.num_threads,
            load_s=time.monotonic() - started_s,
            repeatability=engine.repeatability,
        )
    )
    with contextlib.suppress(EOFError, ConnectionError):
        run_loop(link, engine.node, engine.core, engine.timer)
    engine.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no interpreter teardown: native libraries of the transports may crash in it


if __name__ == "__main__":
    main()
