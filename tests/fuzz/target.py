"""Fuzz target: what any peer may send to a receiver. Run by `python -m tests.fuzz`, which makes seeds and the limits.

One input is one connection: its first byte says how far the peer has come (a stranger; past the handshake; with a grant
of blocks 1 and 2 out of 4), the rest is what it sends before it goes. Whatever that is: the receiver raises nothing,
takes no more memory than a frame of that kind may have, writes no block that was not granted, and has its blocks back.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator

import atheris

with atheris.instrument_imports(include=["kvstore.transport", "kvstore.blocks"]):
    from kvstore.blocks import GrantState
    from kvstore.transport.connection import Connection
    from kvstore.transport.events import Arrived, BlocksFree, Event, ReserveRequested
    from kvstore.transport.frames import MAX_LENGTH, FrameType, Reserve, frame
    from kvstore.transport.loop import Loop
    from kvstore.transport.reader_link import ReaderLink, ReaderPhase
    from kvstore.transport.receiver import ReceiverSide
    from kvstore.transport.region import KVRegion
    from kvstore.transport.settings import NodeContext

NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES = 4, 2, 64
GRANTED = [1, 2]
CANARY = b"\xa5"
MAX_INPUT_BYTES = 64 << 10
REASONS = {"bad_magic", "version", "bad_type", "length", "state", "bad_page", "stale_epoch", "body", "incomplete"} | {
    "checksum", "auth", "protocol", "incarnation", "incompatible", "unknown_grant", "layout", "no_rdma",
}  # fmt: skip


class Receiver:
    """A receiver whose other end is the fuzzer. Made anew for each input, so that serials begin at 1."""

    def __init__(self, region: KVRegion, loop: Loop) -> None:
        self.events: list[Event] = []
        self.now_s = 0.0
        self.context = NodeContext(
            incarnation="reader",
            region=region,
            secrets=lambda: (b"the cluster secret",),
            compat="compat",
            protocols=("tcp",),
            checksum=True,
            clock=lambda: self.now_s,
            emit=self.events.append,
        )
        self.side = ReceiverSide(self.context, loop)

    def run(self, stage: int, sent: bytes) -> None:
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours, "tcp", self.now_s)
        self.side.accept(self.connection)
        (link,) = self.side._links.values()
        try:
            self._come_to(stage, link)
            theirs.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                theirs.send(sent)
            self._read(link)
        finally:
            theirs.close()
        self._read(link)
        self._end(link)

    def _come_to(self, stage: int, link: ReaderLink) -> None:
        if stage >= 1:
            link._open("fuzzer")
        if stage >= 2:
            body = frame(FrameType.RESERVE, Reserve("x", "rid", 5, "tok", len(GRANTED)))
            self.side.on_frame(link, FrameType.RESERVE, bytearray(body[12:]))
            self.side.grant("x", GRANTED, "")

    def _read(self, link: ReaderLink) -> None:
        for _ in range(3):
            if link.phase is not ReaderPhase.CLOSED:
                link.on_readable(self.now_s)
                self._check_memory()
            for _ in range(64):
                if not self.side.work():
                    break
            self.side.table.check_invariants()

    def _check_memory(self) -> None:
        incoming = self.connection._in
        limit = 4096 if self.connection.is_greeting else MAX_LENGTH[incoming.kind]
        assert len(incoming.raw) <= max(limit, 64), f"{len(incoming.raw)} bytes for {incoming.kind.name}"

    def _end(self, link: ReaderLink) -> None:
        """Time goes on: what is still held is held by an `Arrived` that the engine has not answered."""
        for _ in range(8):
            self.now_s += 1.0
            self.side.tick(self.now_s)
        assert link.phase is ReaderPhase.CLOSED, f"the link is {link.phase.name} after its peer has gone"
        for event in list(self.events):
            if isinstance(event, ReserveRequested) and event.xfer != "x":
                self.side.grant(event.xfer, None, "no_space")
            elif isinstance(event, Arrived):
                self.side.settle(event.xfer, False)
        self.side.table.check_invariants()
        held = {state: count for state, count in self.side.blocks_by_state.items() if count}
        assert not held, f"blocks are still {held}"
        granted = [event for event in self.events if isinstance(event, BlocksFree)]
        assert len(granted) <= 1, f"blocks were given back twice: {granted}"
        unknown = set(self.context.rejects) - REASONS
        assert not unknown, f"refusals without a known reason: {unknown}"
        assert GrantState.FREE.value not in self.side.blocks_by_state


def targets() -> Iterator[None]:
    """Send inputs in; checks the pages around the grant after each."""
    region = KVRegion.create(NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES)
    loop = Loop(lambda: 0.0)
    pages = CANARY * region.num_bytes
    while True:
        stage, sent = yield
        region.buffer[:] = pages
        Receiver(region, loop).run(stage, sent)
        for block in set(range(NUM_BLOCKS)) - (set(GRANTED) if stage >= 2 else set()):
            assert region.block(block) == CANARY * region.block_bytes, f"block {block} was written and is not granted"


def main() -> None:
    import logging

    logging.disable(logging.CRITICAL)  # a refusal is a line, at most once a minute and reason: here, each time
    target = targets()
    next(target)

    def one_input(data: bytes) -> None:
        if data:
            target.send((data[0] % 3, data[1 : 1 + MAX_INPUT_BYTES]))

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
