"""Mutual proof that both ends know the cluster secret. Pure: frames in, frames out.

    writer                                         receiver
    HELLO(own, target, compat, protocol, nonce_w) ──▶   target is me?
          ◀── CHALLENGE(own, nonce_r, HMAC("receiver"))
    checks ── PROOF(HMAC("writer")) ──▶                 constant-time compare; then compat
          ◀── WELCOME(shape of the region [, memfd])    or REJECT(reason) at any point

Both MACs cover role, both nonces, both incarnations, protocol and compat, so that none fits another pair, another
direction or another time. What differs (compat) is told only to those who proved the secret.
"""

from __future__ import annotations

import hashlib
import hmac
import os

import msgspec

from kvstore.transport.errors import HandshakeRefused
from kvstore.transport.frames import Challenge, Hello, Proof

NONCE_BYTES = 32


def _mac(secret: bytes, role: str, hello: Hello, incarnation: str, nonce: bytes) -> bytes:
    context = (
        "celeriac-kv", 1, role, hello.nonce, nonce, hello.incarnation, incarnation, hello.protocol, hello.compat
    )  # fmt: skip
    return hmac.new(secret, msgspec.msgpack.encode(context), hashlib.sha256).digest()


class WriterHandshake:
    """The side that connects."""

    def __init__(self, *, secret: bytes, incarnation: str, target: str, compat: str, protocol: str) -> None:
        self._secret = secret
        self.hello = Hello(incarnation, target, compat, protocol, os.urandom(NONCE_BYTES))

    def prove(self, challenge: Challenge) -> Proof:
        """Raises HandshakeRefused: the receiver does not know the secret, or is somebody else."""
        if challenge.incarnation != self.hello.target:
            raise HandshakeRefused(reason="incarnation", detail=challenge.incarnation)
        expected = _mac(self._secret, "receiver", self.hello, challenge.incarnation, challenge.nonce)
        if not hmac.compare_digest(expected, challenge.mac):
            raise HandshakeRefused(reason="auth")
        return Proof(_mac(self._secret, "writer", self.hello, challenge.incarnation, challenge.nonce))


class ReceiverHandshake:
    """The side that accepts."""

    def __init__(self, *, secret: bytes, incarnation: str, compat: str, protocol: str) -> None:
        self._secret = secret
        self._incarnation = incarnation
        self._compat = compat
        self._protocol = protocol
        self._nonce = os.urandom(NONCE_BYTES)
        self.hello: Hello | None = None

    def challenge(self, hello: Hello) -> Challenge:
        """Raises HandshakeRefused: the writer wants somebody else, or speaks another transport."""
        if hello.target != self._incarnation:
            raise HandshakeRefused(reason="incarnation", detail="the address has a new owner")
        if hello.protocol != self._protocol:
            raise HandshakeRefused(reason="protocol", detail=f"this is {self._protocol}")
        self.hello = hello
        mac = _mac(self._secret, "receiver", hello, self._incarnation, self._nonce)
        return Challenge(self._incarnation, self._nonce, mac)

    def check(self, proof: Proof) -> str:
        """The writer's incarnation. Raises HandshakeRefused: auth or incompatible."""
        if self.hello is None:
            raise HandshakeRefused(reason="state", detail="PROOF before HELLO")
        expected = _mac(self._secret, "writer", self.hello, self._incarnation, self._nonce)
        if not hmac.compare_digest(expected, proof.mac):
            raise HandshakeRefused(reason="auth")
        if self.hello.compat != self._compat:
            detail = f"writer has {self.hello.compat[:64]}, receiver {self._compat[:64]}"
            raise HandshakeRefused(reason="incompatible", detail=detail)
        return self.hello.incarnation
