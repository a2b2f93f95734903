from __future__ import annotations

import pytest

from kvstore.transport.errors import HandshakeRefused
from kvstore.transport.frames import Challenge, Proof
from kvstore.transport.handshake import ReceiverHandshake, WriterHandshake

SECRET = b"s3cret"


def writer(*, secret: bytes = SECRET, target: str = "d0", compat: str = "c1", protocol: str = "tcp") -> WriterHandshake:
    return WriterHandshake(secret=secret, incarnation="p0", target=target, compat=compat, protocol=protocol)


def receiver(*, incarnation: str = "d0", compat: str = "c1", protocol: str = "tcp") -> ReceiverHandshake:
    return ReceiverHandshake(secret=SECRET, incarnation=incarnation, compat=compat, protocol=protocol)


def test_both_ends_prove_the_secret() -> None:
    p, d = writer(), receiver()
    assert d.check(p.prove(d.challenge(p.hello))) == "p0"


def test_the_receivers_own_mac_is_no_proof_of_a_writer() -> None:
    p, d = writer(), receiver()
    challenge = d.challenge(p.hello)
    with pytest.raises(HandshakeRefused, match="auth"):
        d.check(Proof(challenge.mac))


def test_a_receiver_without_the_secret_is_left() -> None:
    with pytest.raises(HandshakeRefused, match="auth"):
        writer().prove(Challenge("d0", bytes(32), bytes(32)))


def test_a_proof_for_another_receiver_does_not_fit() -> None:
    """Relayed by a man in the middle, who answers for d0 and forwards to d1."""
    p, d1 = writer(), receiver(incarnation="d1")
    with pytest.raises(HandshakeRefused, match="incarnation"):
        d1.challenge(p.hello)


def test_another_compat_is_told_only_after_the_proof() -> None:
    p, d = writer(compat="c2"), receiver()
    with pytest.raises(HandshakeRefused) as caught:
        d.check(p.prove(d.challenge(p.hello)))
    assert caught.value.reason == "incompatible"
    assert "c1" in caught.value.detail
    assert "c2" in caught.value.detail


def test_another_transport_is_refused() -> None:
    with pytest.raises(HandshakeRefused, match="protocol"):
        receiver(protocol="shm").challenge(writer().hello)
