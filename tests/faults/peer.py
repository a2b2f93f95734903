"""A writer by hand that knows the secret and keeps to no rule: it sends what a fault wants to be sent."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
from dataclasses import dataclass

from kvstore.transport.checksum import TransferChecksum
from kvstore.transport.frames import (
    HEADER,
    Body,
    Challenge,
    Commit,
    DataHeader,
    FenceBody,
    FrameType,
    GrantBody,
    Reserve,
    data_frame,
    frame,
    parse_body,
    parse_header,
)
from kvstore.transport.handshake import WriterHandshake
from kvstore.transport.region import KVRegion
from tests.contract.transport_peer import COMPAT, SECRET
from tests.faults.site import Site

EPOCH = 5


@dataclass(frozen=True)
class Session:
    """A right transfer: `pages[i]` is a whole DATA frame, `where[i]` its place and layer."""

    xfer: str
    grant: GrantBody
    pages: list[bytes]
    where: list[tuple[int, int]]
    commit: bytes

    @property
    def stream(self) -> bytes:
        return b"".join(self.pages) + self.commit

    def end(self, kind: FrameType) -> bytes:
        return frame(kind, FenceBody(self.xfer, self.grant.grant_id))


class Peer:
    """One link to a `Site` over tcp."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self.sock = socket.create_connection((site.address.tcp_host, site.address.tcp_port), timeout=5)
        handshake = WriterHandshake(
            secrets=[SECRET], incarnation="storm", target=site.address.incarnation, compat=COMPAT, protocol="tcp"
        )  # fmt: skip
        self.spoken = b""  # all of the handshake that this end said
        self._say(FrameType.HELLO, handshake.hello)
        challenge = parse_body(FrameType.CHALLENGE, self.read(FrameType.CHALLENGE), Challenge)
        self._say(FrameType.PROOF, handshake.prove(challenge))
        self.read(FrameType.WELCOME)

    def session(self, xfer: str, num_places: int, source: KVRegion, rng: random.Random) -> Session:
        """Ask for a grant and make the frames of a right transfer of random pages."""
        source.buffer[:] = rng.randbytes(source.num_bytes)
        self.sock.sendall(frame(FrameType.RESERVE, Reserve(xfer, "rid", EPOCH, "tok", num_places)))
        self._site.wait_granted(xfer, timeout_s=5)
        grant = parse_body(FrameType.GRANT, self.read(FrameType.GRANT), GrantBody)
        where = [(place, layer) for place in range(num_places) for layer in range(source.num_layers)]
        pages = []
        for place, layer in where:
            run = source.run(place, layer, layer + 1)
            header = DataHeader(grant.serial, EPOCH, place, 1, layer, layer + 1)
            pages.append(data_frame(header, len(run)) + bytes(run))
        state = rng.randbytes(rng.randrange(64))
        places = list(range(num_places))
        checksum = TransferChecksum(xfer=xfer, epoch=EPOCH, num_tokens=num_places, state=state)
        for _ in checksum.update(source, places, 1 << 30):
            pass
        body = Commit(
            xfer, grant.grant_id, EPOCH, num_places, num_places, checksum.value(), state, source.num_bytes, 0.0
        )  # fmt: skip
        right = b"".join(source.block(place) for place in places)
        self._site.expected[xfer] = (right, state)
        return Session(xfer, grant, pages, where, frame(FrameType.COMMIT, body))

    def send(self, data: bytes) -> None:
        """The receiver may close at any byte; that is no error here."""
        with contextlib.suppress(OSError):
            self.sock.sendall(data)

    def read(self, kind: FrameType) -> bytes:
        """Body of the next frame of this type; others are skipped. Raises EOFError, OSError."""
        while True:
            got, length = parse_header(self._exactly(HEADER.size))
            body = self._exactly(length)
            if got is kind:
                return body

    def close(self, *, is_reset: bool) -> None:
        if is_reset:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _say(self, kind: FrameType, body: Body) -> None:
        data = frame(kind, body)
        self.spoken += data
        self.sock.sendall(data)

    def _exactly(self, num_bytes: int) -> bytes:
        got = b""
        while len(got) < num_bytes:
            piece = self.sock.recv(num_bytes - len(got))
            if not piece:
                raise EOFError
            got += piece
        return got
