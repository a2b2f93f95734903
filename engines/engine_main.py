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

from engines.core import EngineCore
from engines.front_link import FrontLink
from engines.messages import Ready, Shutdown, decode_front
from engines.parent import end_with
from engines.step_timer import OFF, StepTimer
from kvstore import transport as kv
from kvstore.clock import now_s


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
        link.flush()
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

    engine = build_engine(config, link.send, post=link.post)
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
