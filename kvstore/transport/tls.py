"""TLS 1.3 under the frames of a tcp connection, both ends with a certificate. The HMAC handshake goes on inside.

    connect ── TLS: each checks the other's certificate against the CA ── HELLO ... WELCOME ── frames

Certificates say that a host may talk to the cluster; the secret says that a process belongs to it. Where a pair does
not come about, the reason has a name: certificate_expired, certificate_unknown (not signed by our CA),
certificate_host, certificate_missing, certificate_refused (by the peer: its log says why), not_tls, tls.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvstore.transport.errors import HandshakeRefused, TlsFilesError

# OpenSSL's X509_V_ERR_*
_CERTIFICATE_REASONS: Final = {
    9: "certificate_expired",  # not yet valid
    10: "certificate_expired",
    18: "certificate_unknown",  # self-signed
    19: "certificate_unknown",
    20: "certificate_unknown",
    21: "certificate_unknown",
    62: "certificate_host",
    64: "certificate_host",
}
_NOT_TLS: Final = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER", "PACKET_LENGTH")


@dataclass(frozen=True)
class TlsFiles:
    """Where the certificates are (PEM).

    Attributes:
        certificate, key: of this host, for both directions; the key for its owner only.
        ca: whom to believe: of the cluster, not of the public.
        check_host: whether the certificate of a dialled peer must name the address that was dialled.
    """

    certificate: str
    key: str
    ca: str
    check_host: bool = True


class Tls:
    """The two contexts of a node. The files are read once."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises TlsFilesError."""
        self._accepting = _context(files, ssl.PROTOCOL_TLS_SERVER)
        self._accepting.num_tickets = 0
        self._dialling = _context(files, ssl.PROTOCOL_TLS_CLIENT)
        self._dialling.check_hostname = files.check_host

    def accept(self, sock: socket.socket) -> TlsWire:
        return TlsWire(self._accepting.wrap_socket(sock, server_side=True, do_handshake_on_connect=False))

    def dial(self, sock: socket.socket, host: str) -> TlsWire:
        """Over a connected socket. `host`: as it was dialled."""
        wrapped = self._dialling.wrap_socket(sock, do_handshake_on_connect=False, server_hostname=host)
        return TlsWire(wrapped, wants_write=True)


_NOTHING = memoryview(b"")


class TlsWire:
    """Not up until both handshakes of TLS are through; the first calls of `send` and `receive` carry them on."""

    max_views = 1  # OpenSSL makes one record of at most 16 KiB at a time
    is_resending = True  # the record is encrypted already

    def __init__(self, sock: ssl.SSLSocket, *, wants_write: bool = False) -> None:
        self.sock = sock
        self._is_up = False
        self._has_heard = False  # a writer knows only then that its own certificate was taken
        self._wants_write = wants_write

    @property
    def wants_write(self) -> bool | None:
        return None if self._is_up else self._wants_write

    @property
    def num_buffered_bytes(self) -> int:
        return self.sock.pending()

    def send(self, views: Sequence[memoryview]) -> int:
        self.come_up()
        try:
            return self.sock.send(views[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def receive(self, views: Sequence[memoryview]) -> int:
        self.come_up()
        try:
            num_bytes = self.sock.recv_into(views[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            if self._has_heard:
                raise
            raise _refusal(error) from error
        self._has_heard = self._has_heard or num_bytes > 0
        return num_bytes

    def read_ahead(self) -> memoryview:
        return _NOTHING

    def skip(self, num_bytes: int) -> None:
        assert not num_bytes, "nothing was read ahead"

    def come_up(self) -> None:
        if self._is_up:
            return
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._wants_write = False
            raise BlockingIOError from None
        except ssl.SSLWantWriteError:
            self._wants_write = True
            raise BlockingIOError from None
        except OSError as error:
            raise _refusal(error) from error
        self._is_up = True


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET  # links are few and long
    _load(files.ca, "tls_ca", lambda: context.load_verify_locations(files.ca))
    _load(files.certificate, "tls_certificate", lambda: context.load_cert_chain(files.certificate, files.key))
    return context


def _load(path: str, name: str, load: object) -> None:
    assert callable(load)
    try:
        load()
    except (OSError, ValueError) as error:
        what = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
        raise TlsFilesError(setting=f"transfer.{name}", path=path, what=str(what)) from error


def _refusal(error: OSError) -> HandshakeRefused:
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = _CERTIFICATE_REASONS.get(error.verify_code, "certificate_unknown")
        return HandshakeRefused(reason=reason, detail=error.verify_message)
    name = getattr(error, "reason", None) or ""
    if name == "PEER_DID_NOT_RETURN_A_CERTIFICATE":
        return HandshakeRefused(reason="certificate_missing", detail="the peer shows no certificate")
    if "ALERT" in name and ("CERTIFICATE" in name or name.endswith("UNKNOWN_CA")):
        return HandshakeRefused(reason="certificate_refused", detail=f"the peer refuses ours ({name})")
    if isinstance(error, (ssl.SSLEOFError, ConnectionError)) or any(word in name for word in _NOT_TLS):
        return HandshakeRefused(reason="not_tls", detail="`transfer.tls` is on at one end only")
    return HandshakeRefused(reason="tls", detail=name or str(error))
