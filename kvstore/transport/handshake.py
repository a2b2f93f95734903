"""Mutual proof that both ends know the cluster secret. Pure: frames in, frames out.

    writer                                         receiver
    HELLO(own, target, compat, protocol, nonce_w,
          ids of my secrets) ──▶                        target is me? my first secret that the writer has, too
          ◀── CHALLENGE(own, nonce_r, HMAC("receiver"), id of that secret)
    checks ── PROOF(HMAC("writer")) ──▶                 constant-time compare; then compat
          ◀── WELCOME(shape of the region [, memfd])    or REJECT(reason) at any point

Both MACs cover role, both nonces, both incarnations, protocol, compat and the writer's layout, so that none fits
another pair, another direction or another time. What differs is told only to those who proved the secret. `compat` must
be equal; layouts may differ in what can be converted (`kvstore.reshard`).

While secrets are rotated each end accepts several. An id of a secret is an HMAC of the writer's nonce, so that it says
nothing to who listens; all ids are inside the MACs, so that nobody in between can strike the newest out.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence

import msgspec

from kvstore.reshard import Conversion, Inconvertible, KVLayout
from kvstore.transport.errors import HandshakeRefused
from kvstore.transport.frames import Challenge, Hello, Proof

NONCE_BYTES = 32
KEY_ID_BYTES = 8
MAX_SECRETS = 8


def _key_id(secret: bytes, nonce: bytes) -> bytes:
    return hmac.new(secret, b"celeriac-kv key " + nonce, hashlib.sha256).digest()[:KEY_ID_BYTES]


def _mac(secret: bytes, role: str, hello: Hello, incarnation: str, nonce: bytes) -> bytes:
    pair = (hello.incarnation, incarnation, hello.protocol, hello.compat, hello.layout)
    context = ("celeriac-kv", 2, role, hello.nonce, nonce, *pair, hello.keys)
    return hmac.new(secret, msgspec.msgpack.encode(context), hashlib.sha256).digest()


class WriterHandshake:
    """The side that connects. `secrets`: all that are accepted, the current one first; at most 8 are offered."""

    def __init__(
        self,
        *,
        secrets: Sequence[bytes],
        incarnation: str,
        target: str,
        compat: str,
        protocol: str,
        layout: KVLayout | None = None,
    ) -> None:
        nonce = os.urandom(NONCE_BYTES)
        self._secrets = {_key_id(secret, nonce): secret for secret in secrets[:MAX_SECRETS]}
        self.hello = Hello(incarnation, target, compat, protocol, nonce, list(self._secrets), layout)

    def prove(self, challenge: Challenge) -> Proof:
        """Raises HandshakeRefused: the receiver does not know the secret, or is somebody else."""
        if challenge.incarnation != self.hello.target:
            raise HandshakeRefused(reason="incarnation", detail=challenge.incarnation)
        secret = self._secrets.get(challenge.key)
        if secret is None:
            raise HandshakeRefused(reason="auth")
        expected = _mac(secret, "receiver", self.hello, challenge.incarnation, challenge.nonce)
        if not hmac.compare_digest(expected, challenge.mac):
            raise HandshakeRefused(reason="auth")
        return Proof(_mac(secret, "writer", self.hello, challenge.incarnation, challenge.nonce))


class ReceiverHandshake:
    """The side that accepts. `secrets`: all that are accepted, the current one first."""

    def __init__(
        self, *, secrets: Sequence[bytes], incarnation: str, compat: str, protocol: str, layout: KVLayout | None = None
    ) -> None:
        self._secrets = tuple(secrets[:MAX_SECRETS])
        self._secret = b""
        self._layout = layout
        self._incarnation = incarnation
        self._compat = compat
        self._protocol = protocol
        self._nonce = os.urandom(NONCE_BYTES)
        self.hello: Hello | None = None
        self.conversion: Conversion | None = None  # once the proof is checked; None if either side names no layout

    def challenge(self, hello: Hello) -> Challenge:
        """Raises HandshakeRefused: the writer wants somebody else, speaks another transport, or shares no secret."""
        if hello.target != self._incarnation:
            raise HandshakeRefused(reason="incarnation", detail="the address has a new owner")
        if hello.protocol != self._protocol:
            raise HandshakeRefused(reason="protocol", detail=f"this is {self._protocol}")
        self.hello = hello
        for secret in self._secrets:
            key_id = _key_id(secret, hello.nonce)
            if key_id in hello.keys:
                self._secret = secret
                mac = _mac(secret, "receiver", hello, self._incarnation, self._nonce)
                return Challenge(self._incarnation, self._nonce, mac, key_id)
        raise HandshakeRefused(reason="auth")

    def check(self, proof: Proof) -> str:
        """The writer's incarnation. Raises HandshakeRefused: auth, incompatible or layout."""
        if self.hello is None or not self._secret:
            raise HandshakeRefused(reason="state", detail="PROOF before HELLO")
        expected = _mac(self._secret, "writer", self.hello, self._incarnation, self._nonce)
        if not hmac.compare_digest(expected, proof.mac):
            raise HandshakeRefused(reason="auth")
        if self.hello.compat != self._compat:
            detail = f"writer has {self.hello.compat[:90]}, receiver {self._compat[:90]}"
            raise HandshakeRefused(reason="incompatible", detail=detail)
        self.conversion = conversion_of(self.hello.layout, self._layout, self._protocol)
        return self.hello.incarnation


def conversion_of(writer: KVLayout | None, receiver: KVLayout | None, protocol: str) -> Conversion | None:
    """What the link has to do, or None where a side names no layout.

    Raises:
        HandshakeRefused: `layout`; the detail names the values of both sides.
    """
    if writer is None or receiver is None:
        return None
    try:
        return Conversion.between(writer, receiver, is_network=protocol == "tcp")
    except Inconvertible as error:
        raise HandshakeRefused(reason="layout", detail=str(error)) from error
