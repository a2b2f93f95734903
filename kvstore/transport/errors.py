"""What can go wrong on the transfer plane, as one tree.

    TransportError(retryable)
    ├── BadFrame           a peer sent what the protocol does not allow: that connection is closed, counted by `reason`
    ├── HandshakeRefused   a peer does not fit or does not know the secret: typed, told to the other side
    ├── RegionError        the KV region cannot be made, or a peer's region is not what it said
    ├── TlsFilesError      a certificate, key or CA file cannot be used
    └── RdmaError          NIXL cannot be used here or with this peer, or a write of it failed

None of them reaches a request: the node turns them into `GrantRefused` and `PushFailed` events.
"""

from __future__ import annotations


class TransportError(Exception):
    """Base of all errors of this package. `retryable`: the same call may succeed later, unchanged."""

    retryable: bool = False


class BadFrame(TransportError):
    """`reason` is the label of `kv_reject_total`: bad_magic, version, bad_type, length, state, bad_page, body, ..."""

    def __init__(self, *, reason: str, detail: str) -> None:
        super().__init__(
            f"KV peer broke the protocol ({reason}): {detail}. The connection is closed, its grants are freed; "
            "if it repeats, compare the versions of both workers."
        )
        self.reason = reason
        self.detail = detail


class HandshakeRefused(TransportError):
    """`reason` is version, auth, incompatible, incarnation, credentials, one of `tls`, or what a newer peer may add."""

    def __init__(self, *, reason: str, detail: str = "") -> None:
        super().__init__(
            f"KV handshake refused ({reason}{': ' + detail if detail else ''}). Both workers must share the cluster "
            "secret, the model, and a version of this program that speaks the same protocol."
        )
        self.reason = reason
        self.detail = detail


class TlsFilesError(TransportError):
    """A file of `transfer.tls` cannot be used."""

    def __init__(self, *, setting: str, path: str, what: str) -> None:
        super().__init__(
            f"{setting}: {path!r} cannot be used ({what}). Expected a PEM file: a certificate and its private key, "
            "signed by the CA of the cluster (docs/security.md)."
        )
        self.setting = setting
        self.path = path
        self.what = what


class RegionError(TransportError):
    """The memory of a region cannot be used."""

    def __init__(self, *, what: str, expected: str) -> None:
        super().__init__(f"KV region: {what}. Expected {expected}; lower `kv.memory_bytes`, or restart the peer.")
        self.what = what
        self.expected = expected


class RdmaError(TransportError):
    """`reason` is no_rdma (not here, or not with this peer), or begins with channel_lost (a write failed)."""

    def __init__(self, *, reason: str, detail: str) -> None:
        super().__init__(f"KV over rdma ({reason}): {detail}. With `transfer.protocol: auto` tcp is used instead.")
        self.reason = reason
        self.detail = detail
