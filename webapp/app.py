"""The Flask app: JSON errors for everything, a request id on every answer, and the endpoints."""

from __future__ import annotations

import logging
import re
import secrets
import time
from importlib.metadata import version
from typing import Any, Final

import msgspec
from flask import Flask, Response, current_app, g, request
from werkzeug.exceptions import HTTPException

import configs
from configs.schema import Settings
from kvstore.state.store import StateStore
from tasks.reaper import Reaper
from tasks.wakeups import WakeupSender
from webapp.errors import ApiError
from webapp.gateway import Gateway, Parts
from webapp.openai.served_model import load_served_model

_log = logging.getLogger(__name__)

VERSION: Final = version("celeriac")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_ENDPOINTS: Final = frozenset(
    {"completions", "chat", "models", "model", "tokenize", "detokenize", "requests", "request", "stream", "cancel"}
    | {"health", "ready", "version", "metrics"}
)
_HTTP_CODES: Final = {
    400: "malformed_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "body_too_large",
    414: "url_too_long",
    415: "unsupported_media_type",
}


def create_app(settings: Settings, parts: Parts | None = None) -> Flask:
    """The app and its gateway (`gateway_of(app)`), not yet started. Call it after a fork.

    Raises:
        OSError, ValueError: the model's tokenizer or the secret cannot be read.
    """
    from webapp import generate, ops_routes, request_routes, token_routes

    app = Flask("celeriac", static_folder=None)
    # A doubled slash or another spelling of a path is another path, never a redirect into a route.
    app.url_map.merge_slashes = False
    app.extensions["gateway"] = Gateway(settings, parts or make_parts(settings))
    for blueprint in (generate.routes, request_routes.routes, token_routes.routes, ops_routes.routes):
        app.register_blueprint(blueprint)
    app.before_request(_begin)
    app.after_request(_complete_head)
    app.register_error_handler(ApiError, _api_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _bug)
    return app


def make_parts(settings: Settings) -> Parts:
    """The real parts: a state store, the tokenizer, the Celery sender, the reaper."""
    store = StateStore(settings.state.state_url, num_shards=settings.state.num_shards)
    sender = WakeupSender(settings)
    return Parts(
        store=store,
        model=load_served_model(settings.model, version=VERSION),
        sender=sender,
        secret=configs.secret(settings),
        reaper=Reaper(settings, store, sender),
    )


def gateway_of(app: Flask | None = None) -> Gateway:
    """The gateway of this process."""
    gateway: Gateway = (app or current_app).extensions["gateway"]
    return gateway


def json_answer(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer. msgspec writes what it gets as it is, so numbers stay finite and keys in order."""
    return Response(msgspec.json.encode(body), status, headers, mimetype="application/json")


def no_options(**options: Any) -> dict[str, Any]:
    """Route options: OPTIONS answers only where CORS is configured, which it is not."""
    return {"provide_automatic_options": False, **options}


def _begin() -> None:
    g.started_s = time.monotonic()
    given = request.headers.get("x-request-id", "")
    g.own_request_id = "" if not _REQUEST_ID.fullmatch(given) else given
    g.request_id = g.own_request_id or f"req-{secrets.token_hex(13)}"


def _complete_head(response: Response) -> Response:
    gateway = gateway_of()
    response.headers["x-request-id"] = g.get("request_id", "")
    response.headers["openai-version"] = "2020-10-01"
    response.headers["openai-processing-ms"] = str(round((time.monotonic() - g.started_s) * 1000))
    endpoint = (request.endpoint or "").rpartition(".")[2]
    gateway.metrics.answers.labels(endpoint if endpoint in _ENDPOINTS else "other", str(response.status_code)).inc()
    return response


def _api_error(error: ApiError) -> Response:
    return json_answer(error.body(), error.status, error.headers)


def _http_error(error: HTTPException) -> Response:
    status = error.code or 500
    original = error.get_response()
    headers = {"Allow": original.headers["Allow"]} if "Allow" in original.headers else {}
    message = {
        404: "there is nothing at this path; see the API reference for the endpoints",
        405: f"this path does not take {request.method[:20]}; allowed: {headers.get('Allow', 'nothing')}",
    }.get(status, error.description or "the request could not be read")
    code = _HTTP_CODES.get(status, "internal_error" if status >= 500 else "malformed_request")
    return _api_error(ApiError(status, code, message, headers=headers))


def _bug(error: Exception) -> Response:
    _log.exception("request %s met a bug", g.get("request_id", "?"), exc_info=error)
    message = f"an error of the server; report it with the id {g.get('request_id', '?')}"
    return _api_error(ApiError(500, "internal_error", message))
