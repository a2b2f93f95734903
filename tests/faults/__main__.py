"""A storm of faults over real KV nodes: `python -m tests.faults --faults 10000 --seed 1 [--json]`.

A receiver with a pool of blocks; a writer by hand that sends flipped, cut, stale, doubled and reordered frames; and
writer processes that are stopped and killed in mid-transfer, over shared memory and tcp. After each fault: nothing
arrived but what was sent, every block is free within 5 s of the writer's last word or proven death, and all invariants
hold.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable

from kvstore.transport.frames import FrameType
from kvstore.transport.region import KVRegion
from tests.contract import transport_peer
from tests.contract.transport_helpers import Child
from tests.faults.kinds import KINDS, Kind, Outcome
from tests.faults.peer import Peer
from tests.faults.site import Site

NUM_BLOCKS, NUM_LAYERS, LAYER_BYTES, MAX_PLACES = 16, 3, 512, 4
PROCESS_EVERY = 250  # one fault of so many stops and kills a process: it takes seconds


class Storm:
    """Counts what it did. Use as a context."""

    def __init__(self, *, seed: int, process_every: int = PROCESS_EVERY, checksum: bool = True) -> None:
        self.done: Counter[str] = Counter()
        self.longest_back_s = 0.0
        self._rng = random.Random(seed)
        self._process_every = process_every
        self._checksum = checksum
        self._stack = contextlib.ExitStack()
        self._peer: Peer | None = None
        self._source = KVRegion.create(MAX_PLACES, NUM_LAYERS, LAYER_BYTES)
        self._recorded: list[bytes] = []

    def __enter__(self) -> Storm:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="celeriac-faults-"))
        self._folder = folder
        self._site = Site(
            "tcp",
            folder,
            num_blocks=NUM_BLOCKS,
            num_layers=NUM_LAYERS,
            layer_bytes=LAYER_BYTES,
            checksum=self._checksum,
        )
        self._stack.callback(self._site.close)
        return self

    def __exit__(self, *_: object) -> None:
        if self._peer is not None:
            self._peer.close(is_reset=False)
        self._stack.close()

    def run(self, num_faults: int, *, seconds: float = float("inf")) -> None:
        """Raises AssertionError: a fault did harm; it names its number and kind."""
        ends_s = time.monotonic() + seconds
        for number in range(num_faults):
            if time.monotonic() > ends_s:
                return
            if number % self._process_every == self._process_every - 1:
                name, action = self._process_fault(number)
            elif number % 50 == 49 and self._recorded:
                name, action = "handshake_again", self._replay_handshake
            else:
                kind = self._rng.choice(KINDS)
                name, action = kind.__name__, lambda kind=kind, number=number: self._frame_fault(kind, number)
            try:
                action()
            except Exception as error:
                raise AssertionError(f"fault {number} ({name}): {error}") from error
            self.done[name] += 1
            if sys.stderr.isatty() and number % 100 == 0:
                print(f"\r{number}/{num_faults} faults", end="", file=sys.stderr, flush=True)

    # ---------------------------------------------------------------- faults
    def _frame_fault(self, kind: Kind, number: int) -> None:
        site, rng, xfer = self._site, self._rng, f"storm:{number}"
        if self._peer is None:
            self._peer = Peer(site)
            self._recorded = [self._peer.spoken]
        peer = self._peer
        session = peer.session(xfer, rng.randint(1, MAX_PLACES), self._source, rng)
        fault = kind(session, rng)
        peer.send(fault.sent)
        if fault.outcome is Outcome.ONCE:
            self._wait_arrived(xfer)
            peer.read(FrameType.HANDED)
        else:
            if rng.random() < 0.5:  # sometimes the receiver has read all of it before the end, sometimes not
                site.turn(0.002)
            peer.close(is_reset=rng.random() < 0.3)
            self._peer = None
        self._check(site, xfer, fault.outcome)

    def _replay_handshake(self) -> None:
        """Another connection says word for word what a right one has said."""
        before = self._site.node.rejects().get("auth", 0)
        with socket.create_connection((self._site.address.tcp_host, self._site.address.tcp_port), timeout=5) as sock:
            sock.sendall(self._recorded[0])
            while sock.recv(1 << 16):
                if self._site.node.rejects().get("auth", 0) > before:
                    break
        assert self._site.node.rejects().get("auth", 0) == before + 1, "a recorded handshake was taken"

    def _process_fault(self, number: int) -> tuple[str, Callable[[], None]]:
        protocol = ("shm", "tcp")[number // self._process_every % 2]
        is_stopped = number // self._process_every % 4 >= 2
        name = f"process_{'stopped_then_killed' if is_stopped else 'killed'}_{protocol}"
        return name, lambda: self._kill(protocol, is_stopped=is_stopped)

    def _kill(self, protocol: str, *, is_stopped: bool) -> None:
        site = Site(
            protocol,
            self._folder,
            num_blocks=transport_peer.NUM_BLOCKS,
            num_layers=transport_peer.NUM_LAYERS,
            layer_bytes=transport_peer.LAYER_BYTES,
        )
        try:
            with Child("writer", protocol, self._folder, site.address) as child:
                site.wait_granted("w:1", timeout_s=20)
                assert child.read_event() == "GrantReceived"
                child.tell("push")
                time.sleep(self._rng.uniform(0.0, 0.05))
                if is_stopped:
                    child.signal(signal.SIGSTOP)
                    ends_s = time.monotonic() + self._rng.uniform(0.1, 2.5)
                    while time.monotonic() < ends_s:
                        site.turn(0.05)
                    assert site.pool.num_used == 8, "blocks of a writer that only stands still were given back"
                child.signal(signal.SIGKILL)
                self._check(site, "w:1", Outcome.NEVER)
        finally:
            site.close()

    # ---------------------------------------------------------------- what must hold
    def _wait_arrived(self, xfer: str) -> None:
        ends_s = time.monotonic() + 5
        while time.monotonic() < ends_s and not self._site.num_arrived.get(xfer):
            self._site.turn(0.05)
        assert self._site.num_arrived.get(xfer), "a right transfer did not arrive within 5 s"

    def _check(self, site: Site, xfer: str, outcome: Outcome) -> None:
        self.longest_back_s = max(self.longest_back_s, site.wait_back())
        num_arrived = site.num_arrived.pop(xfer, 0)
        assert not site.wrong, f"{site.wrong} arrived with other bytes than were sent"
        if outcome is Outcome.NEVER:
            assert num_arrived == 0, "a damaged transfer arrived"
        elif outcome is Outcome.ONCE:
            assert num_arrived == 1, f"a right transfer arrived {num_arrived} times"
        else:
            assert num_arrived <= 1, f"arrived {num_arrived} times"
        site.expected.pop(xfer, None)
        site.granted.discard(xfer)

    def report(self) -> dict[str, object]:
        return {
            "faults": sum(self.done.values()),
            "by_kind": dict(sorted(self.done.items())),
            "refused_by_reason": dict(sorted(self._site.node.rejects().items())),
            "longest_until_blocks_are_back_s": round(self.longest_back_s, 3),
        }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Inject faults into KV transfers.")
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this long, whatever is done")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    given = parser.parse_args()
    logging.disable(logging.WARNING)  # each refusal is a line
    with Storm(seed=given.seed) as storm:
        try:
            storm.run(given.faults, seconds=given.seconds)
        except AssertionError as error:
            print(f"harm done: {error}; seed {given.seed}", file=sys.stderr)
            return 1
        report = storm.report()
    if given.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
