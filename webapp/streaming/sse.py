"""Events in, bytes out: server-sent events as the official SDKs read them (WHATWG HTML, "Server-sent events").

No state but bytes: a thread or an event loop may drive it. A heartbeat is a comment line with ONE newline: with a
blank line behind it, a client that has seen an `id:` dispatches an empty event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

HEARTBEAT: Final = b": hb\n"
HEARTBEAT_AFTER_S: Final = 15.0
DONE: Final = b"data: [DONE]\n\n"
HEADERS: Final = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}
_encode: Final = msgspec.json.Encoder().encode


def data_event(body: Mapping[str, Any], *, event_id: str = "") -> bytes:
    """One event with a JSON object; the id, if any, is a line inside it."""
    head = f"id: {event_id}\n".encode() if event_id else b""
    return head + b"data: " + _encode(body) + b"\n\n"


def error_event(body: Mapping[str, Any]) -> bytes:
    """The error event and the end: a stream without `[DONE]` would look complete to a client."""
    return b"event: error\ndata: " + _encode(body) + b"\n\n" + DONE
