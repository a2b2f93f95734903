"""Raw bytes of a request, with every limit checked before or while reading: size, type, encoding, time."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from gunicorn.http.errors import ParseException

from webapp.errors import ApiError

BODY_DEADLINE_S: Final = 30.0
_STEP_BYTES: Final = 64 * 1024


Guard = Callable[[socket.socket, float], contextlib.AbstractContextManager[None]]


class Headers(Protocol):
    """The head of a request; names in any case."""

    def get(self, name: str, default: str, /) -> str: ...


class Readable(Protocol):
    """`wsgi.input`."""

    def read(self, size: int, /) -> bytes: ...


def check_headers(headers: Headers, *, max_body_bytes: int) -> None:
    """Refuses by the head alone, before a byte of the body is read.

    Raises:
        ApiError: 415 for another type or encoding, 413 for a body that says it is too large.
    """
    content_type = headers.get("Content-Type", "")
    kind, _, rest = content_type.partition(";")
    charset = rest.replace(" ", "").lower().removeprefix("charset=").strip('"')
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise ApiError(
            415,
            "unsupported_media_type",
            f"Content-Type must be application/json in UTF-8 (got {content_type[:100]!r})",
        )
    encoding = headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(415, "unsupported_media_type", f"Content-Encoding {encoding[:50]!r} is not supported; send none")
    length = headers.get("Content-Length", "")
    if length.isdigit() and int(length) > max_body_bytes:
        raise too_large(max_body_bytes)


def read_body(
    environ: Mapping[str, Any], *, max_body_bytes: int, guard: Guard, deadline_s: float = BODY_DEADLINE_S
) -> bytes:
    """The whole body; blocks at most `deadline_s`.

    Args:
        guard: stops reads from a socket after so many seconds. A timeout of the socket alone would not end a client
            that sends one byte a second.

    Raises:
        ApiError: 413 when it grows past the limit, 408 when it comes too slowly or is cut.
    """
    stream: Readable = environ["wsgi.input"]
    length = environ.get("CONTENT_LENGTH", "")
    if not length and not environ.get("wsgi.input_terminated"):
        return b""
    expected = int(length) if str(length).isdigit() else None
    sock: socket.socket | None = environ.get("gunicorn.socket")
    parts: list[bytes] = []
    size = 0
    try:
        with guard(sock, deadline_s) if sock is not None else contextlib.nullcontext():
            while expected is None or size < expected:
                part = stream.read(_STEP_BYTES if expected is None else min(_STEP_BYTES, expected - size))
                if not part:
                    break
                parts.append(part)
                size += len(part)
                if size > max_body_bytes:
                    raise too_large(max_body_bytes)
    except OSError as error:
        raise _slow(deadline_s) from error
    except ParseException as error:
        raise ApiError(400, "malformed_body", f"the chunked body is not well-formed: {error}") from error
    if expected is not None and size < expected:
        raise _slow(deadline_s)
    return b"".join(parts)


def too_large(max_body_bytes: int) -> ApiError:
    return ApiError(
        413,
        "body_too_large",
        f"body is larger than {max_body_bytes} bytes (gateway.max_body_bytes); send less",
        headers={"Connection": "close"},
    )


def _slow(deadline_s: float) -> ApiError:
    return ApiError(
        408,
        "body_timeout",
        f"the body did not arrive whole within {deadline_s:g} s; send it again",
        headers={"Connection": "close"},
    )
