from __future__ import annotations

import pytest

from kvstore.transport.errors import HandshakeRefused
from kvstore.transport.frames import Challenge, Hello, Proof
from kvstore.transport.handshake import ReceiverHandshake, WriterHandshake

SECRET = b"s3cret"


def writer(*secrets: bytes, target: str = "d0", compat: str = "c1", protocol: str = "tcp") -> WriterHandshake:
    return WriterHandshake(
        secrets=secrets or (SECRET,), incarnation="p0", target=target, compat=compat, protocol=protocol
    )  # fmt: skip


def receiver(*secrets: bytes, incarnation: str = "d0", compat: str = "c1", protocol: str = "tcp") -> ReceiverHandshake:
    return ReceiverHandshake(secrets=secrets or (SECRET,), incarnation=incarnation, compat=compat, protocol=protocol)


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
        writer().prove(Challenge("d0", bytes(32), bytes(32), bytes(8)))


def test_a_receiver_that_knows_only_the_id_of_a_secret_is_left() -> None:
    p = writer()
    with pytest.raises(HandshakeRefused, match="auth"):
        p.prove(Challenge("d0", bytes(32), bytes(32), p.hello.keys[0]))


@pytest.mark.parametrize(
    ("of_writer", "of_receiver"),
    [((b"old",), (b"old", b"new")), ((b"old", b"new"), (b"new", b"old")), ((b"new", b"old"), (b"new",))],
)
def test_ends_with_a_secret_in_common_meet_at_each_step_of_a_rotation(
    of_writer: tuple[bytes, ...], of_receiver: tuple[bytes, ...]
) -> None:
    p, d = writer(*of_writer), receiver(*of_receiver)
    challenge = d.challenge(p.hello)
    first_common = next(secret for secret in of_receiver if secret in of_writer)
    assert challenge.key == p.hello.keys[of_writer.index(first_common)]
    assert d.check(p.prove(challenge)) == "p0"


def test_ends_without_a_common_secret_are_refused() -> None:
    with pytest.raises(HandshakeRefused, match="auth"):
        receiver(b"new", b"newer").challenge(writer(b"old", b"older").hello)


def test_striking_an_id_out_on_the_way_breaks_the_proof() -> None:
    """Else somebody in between could make two ends use the older secret, which may have leaked."""
    p, d = writer(b"new", b"old"), receiver(b"new", b"old")
    struck = Hello(p.hello.incarnation, "d0", "c1", "tcp", p.hello.nonce, p.hello.keys[1:])
    with pytest.raises(HandshakeRefused, match="auth"):
        p.prove(d.challenge(struck))


def test_the_ids_of_a_secret_differ_from_link_to_link() -> None:
    assert writer().hello.keys != writer().hello.keys


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
