"""/v1/requests: where a request is, how long each phase took, its end; cancel; and its stream, resumable anywhere."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, g, request

from kvstore.errors import BadRecord, StateUnavailable
from kvstore.state.keys import is_request_id
from kvstore.state.records import Record
from kvstore.state.replies import Gone
from kvstore.state.transitions import FINAL_STATES, RequestState
from webapp.app import gateway_of, json_answer, no_options
from webapp.errors import ApiError, InvalidRequest, Overloaded
from webapp.gateway import Gateway
from webapp.generate import PREFIXES, stream_answer
from webapp.metrics import record_timings_ms
from webapp.openai.answers import make_writer
from webapp.openai.call import Prompt
from webapp.openai.tool_answers import ToolWriter
from webapp.serving import Serving
from webapp.streaming.position import Position, read_position

routes = Blueprint("requests", __name__)


@routes.get("/v1/requests", **no_options())
def requests() -> Response:
    """Requests of the cluster that have not ended, by state, and those with a stream open here."""
    gateway = gateway_of()
    try:
        counts = gateway.store.count_by_state()
    except StateUnavailable as error:
        raise _unavailable() from error
    by_state = {state.lower(): n for state, n in counts.items()}
    return json_answer({"object": "list", "by_state": by_state, "open_here": gateway.reader.num_open})


@routes.get("/v1/requests/<path:request_id>", endpoint="request", **no_options())
def one_request(request_id: str) -> Response:
    """State, timings and place of a request."""
    gateway = gateway_of()
    return json_answer(describe(gateway, _record(gateway, request_id)))


@routes.delete("/v1/requests/<path:request_id>", endpoint="cancel", **no_options())
@routes.post("/v1/requests/<path:request_id>/cancel", endpoint="cancel", **no_options())
def cancel(request_id: str) -> Response:
    """Ends a request; the same answer when it has ended before."""
    gateway = gateway_of()
    rid = _record(gateway, request_id).rid
    if isinstance(gateway.cancel(rid, "cancelled"), Gone):
        raise _not_found(request_id)
    return json_answer(describe(gateway, _record(gateway, request_id)))


@routes.get("/v1/requests/<path:request_id>/stream", endpoint="stream", **no_options())
def stream(request_id: str) -> Response:
    """The request's stream from a position on (`Last-Event-ID` or `?after=`), else from its beginning."""
    gateway = gateway_of()
    record = _record(gateway, request_id)
    position = _position(gateway, record)
    gateway.admit()
    gateway.metrics.open_calls.inc()

    def leave() -> None:
        gateway.admission.leave()
        gateway.metrics.open_calls.dec()

    try:
        notes, body = gateway.notes_of(record), record.body
        writer = make_writer(
            id=PREFIXES[notes.api] + record.rid,
            model=gateway.model,
            notes=notes,
            prompts=[Prompt(token_ids=body.prompt_ids, echo=notes.echo)],
            choices_per_prompt=body.k,
            first_index=notes.prompt_index * body.k,
        )
        # Where a tool call stands can only be told from the text before: such a stream is read from its beginning.
        session = gateway.follow(record, None if notes.tools else position)
        if notes.tools and position is not None and isinstance(writer, ToolWriter):
            writer.skip(position.counts, position.ended)
    except BaseException:
        leave()
        raise
    serving = Serving(
        gateway,
        session,
        writer,
        sock=request.environ.get("gunicorn.socket"),
        started_s=g.started_s,
        keep_running=True,  # a second reader that leaves must not end the first one's request
        on_close=leave,
    )
    return stream_answer(serving, with_ids=True, headers={"openai-model": gateway.model.name})


def describe(gateway: Gateway, record: Record) -> dict[str, Any]:
    """The object of a request. Times in ms, `created_at` and `deadline_at` in seconds of the Unix epoch."""
    notes = gateway.notes_of(record)
    state = record.state.lower()
    if record.state == RequestState.PREFILLING and record.phase == "transferring":
        state = "transferring"
    is_final = record.state in FINAL_STATES
    timings = {name: round(duration_ms, 3) for name, duration_ms in record_timings_ms(record).items()}
    failed = is_final and record.state != RequestState.FINISHED
    return {
        "id": PREFIXES[notes.api] + record.rid,
        "object": "request",
        "state": state,
        "attempt": record.attempts,
        "model": record.body.model,
        "created_at": notes.created,
        "deadline_at": record.deadline_ms // 1000,
        "prompt_tokens": len(record.body.prompt_ids),
        "completion_tokens": sum(record.n),
        "timings_ms": {"tokenize": round(notes.tokenize_ms, 3), **timings},
        "finish_reason": record.reason or None if record.state == RequestState.FINISHED else None,
        "error": {"code": record.reason or state} if failed else None,
        "metadata": notes.metadata,
    }


def _record(gateway: Gateway, request_id: str) -> Record:
    rid = request_id
    for prefix in PREFIXES.values():
        rid = rid.removeprefix(prefix)
    if not is_request_id(rid):
        raise _not_found(request_id)
    try:
        record = gateway.store.record(rid)
    except StateUnavailable as error:
        raise _unavailable() from error
    except BadRecord as error:
        raise ApiError(500, "internal_error", f"request {rid} has an unreadable record") from error
    if record is None:
        raise _not_found(request_id)
    return record


def _position(gateway: Gateway, record: Record) -> Position | None:
    word = request.headers.get("Last-Event-ID") or request.args.get("after")
    if not word:
        return None
    position = read_position(record.rid, word, gateway.secret)
    if position is None or len(position.counts) != record.body.k:
        message = "Last-Event-ID is no position of this request; send the last id as it came, or none"
        raise InvalidRequest("invalid_value", message, param="Last-Event-ID")
    return position


def _not_found(request_id: str) -> ApiError:
    message = f"request {request_id[:100]!r} is unknown; a record is kept for 300 s after its end"
    return ApiError(404, "not_found", message)


def _unavailable() -> ApiError:
    return Overloaded("not_ready", "the state server cannot be reached; try again later", retry_after_s=2)
