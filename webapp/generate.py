"""POST /v1/completions and /v1/chat/completions: read, check, accept, then answer at once or as a stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from flask import Blueprint, Response, g, request

from kvstore.state.entries import FinEntry
from webapp.app import gateway_of, json_answer, no_options
from webapp.body import check_headers, read_body
from webapp.errors import InvalidRequest
from webapp.gateway import Gateway
from webapp.openai.answers import Writer, make_writer
from webapp.openai.call import Call
from webapp.openai.chat_body import parse_chat
from webapp.openai.completion_body import parse_completion
from webapp.openai.pieces import Piece
from webapp.openai.served_model import ServedModel
from webapp.serving import Serving, whole_answer
from webapp.streaming import sse
from webapp.strict_json import decode_object

routes = Blueprint("generate", __name__)

PREFIXES: Final = {"chat": "chatcmpl-", "completion": "cmpl-"}
MAX_TIMEOUT_MS: Final = 3_600_000
Parse = Callable[..., Call]


@routes.post("/v1/completions", **no_options())
def completions() -> Response:
    """A text completion."""
    return _generate(parse_completion)


@routes.post("/v1/chat/completions", **no_options())
def chat() -> Response:
    """A chat completion."""
    return _generate(parse_chat)


def read_json(gateway: Gateway) -> tuple[dict[str, Any], bytes]:
    """The body as an object, and as it came.

    Raises:
        ApiError: see `webapp.body` and `webapp.strict_json`.
    """
    limits = gateway.settings.gateway
    check_headers(request.headers, max_body_bytes=limits.max_body_bytes)
    raw = read_body(request.environ, max_body_bytes=limits.max_body_bytes, guard=gateway.watcher.read_deadline)
    return decode_object(raw, duplicate_keys=limits.duplicate_keys), raw


def _generate(parse: Parse) -> Response:
    gateway = gateway_of()
    gateway.admit()
    gateway.metrics.open_calls.inc()
    serving: Serving | None = None
    try:
        body, raw = read_json(gateway)
        call = _parsed(parse, body, gateway.model, gateway.settings.gateway.unknown_fields)
        if call.params[0].max_tokens == 0:
            return _only_echo(gateway, call)
        timeout_s = timeout_of(request.headers.get("x-request-timeout-ms"), gateway.settings.gateway.default_timeout_s)
        session = gateway.submit(call, timeout_s=timeout_s, body_hash=hashlib.sha256(raw).hexdigest())
        serving = Serving(
            gateway,
            session,
            writer_for(call, session.rids[0], gateway.model),
            sock=request.environ.get("gunicorn.socket"),
            started_s=g.started_s,
            keep_running=request.headers.get("x-on-disconnect", "").strip().lower() == "continue",
            on_close=lambda: _leave(gateway),
        )
        if not g.own_request_id:
            g.request_id = session.rids[0]
        headers = {"openai-model": gateway.model.name}
        if call.ignored_fields:
            headers["x-ignored-fields"] = (
                ", ".join(name[:100] for name in call.ignored_fields[:20]).encode("ascii", "replace").decode()
            )
        if not call.stream:
            answer = whole_answer(serving, call.num_choices)
            return json_answer(answer, headers=headers)
        with_ids = call.include_event_ids or request.headers.get("x-stream-ids") == "1"
        return stream_answer(serving, with_ids=with_ids, headers=headers)
    finally:
        if serving is None:
            _leave(gateway)


def _only_echo(gateway: Gateway, call: Call) -> Response:
    """`max_tokens: 0` gives the prompt back: nothing is computed, so nothing is accepted."""
    writer = writer_for(call, gateway.store.new_request_id(), gateway.model)
    n = call.params[0].n
    ends = [Piece(i % n, "", (), 0, FinEntry("FINISHED", "length"), True) for i in range(call.num_choices)]
    if not call.stream:
        return json_answer(writer.answer([[piece] for piece in ends]))
    chunks = [chunk for i, piece in enumerate(ends) for chunk in writer.chunks(i, piece)]
    body = b"".join(sse.data_event(chunk) for chunk in [*chunks, *writer.last_chunks()]) + sse.DONE
    return Response(body, headers=sse.HEADERS)


def _leave(gateway: Gateway) -> None:
    gateway.admission.leave()
    gateway.metrics.open_calls.dec()


def _parsed(parse: Parse, body: dict[str, Any], model: ServedModel, unknown_fields: str) -> Call:
    return parse(body, model, unknown_fields=unknown_fields)


def writer_for(call: Call, rid: str, model: ServedModel) -> Writer:
    """The writer of a new call whose first request is `rid`."""
    return make_writer(
        id=PREFIXES[call.notes.api] + rid,
        model=model,
        notes=call.notes,
        prompts=call.prompts,
        choices_per_prompt=call.params[0].n,
    )


def stream_answer(serving: Serving, *, with_ids: bool, headers: Mapping[str, str]) -> Response:
    """The 200 of a stream. Everything that can be refused was refused before."""

    def body() -> Iterator[bytes]:
        yield from serving.stream(with_ids=with_ids)

    response = Response(body(), headers={**sse.HEADERS, **headers})
    # A generator that was never started runs no cleanup of its own.
    response.call_on_close(serving.close)
    return response


def timeout_of(given: str | None, default_s: float) -> float:
    """Seconds the whole request may take: `x-request-timeout-ms`, else the server's default.

    Raises:
        InvalidRequest: not 1..3600000 ms.
    """
    if given is None:
        return default_s
    if not (given.isascii() and given.isdigit() and 1 <= int(given[:10]) <= MAX_TIMEOUT_MS):
        message = f"x-request-timeout-ms must be between 1 and {MAX_TIMEOUT_MS} (got {given[:50]!r})"
        raise InvalidRequest("out_of_range", message, param="x-request-timeout-ms")
    return int(given) / 1000
