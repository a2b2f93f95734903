"""The gateway as a gunicorn of one kind of worker: threads. `celeriac gateway` calls `run_gateway`."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys
from typing import Any, Final

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.http import errors as http_errors
from gunicorn.workers.gthread import ThreadWorker

from configs.schema import Settings
from webapp.app import create_app, gateway_of
from webapp.errors import ApiError
from webapp.gateway import DRAIN_GRACE_S, Gateway
from webapp.serving import WRITE_DEADLINE_S

HEAD_DEADLINE_S: Final = 10.0
UNREAD_BODY_S: Final = 2.0
SWITCH_INTERVAL_S: Final = 0.0005  # a thread that has tokens to send must not wait 5 ms for the interpreter
_REASONS: Final = {400: "Bad Request", 414: "URI Too Long", 417: "Expectation Failed", 431: "Header Fields Too Large"}


class GatewayWorker(ThreadWorker):  # type: ignore[misc]
    """gunicorn's thread worker that ends its streams properly and answers in JSON even below the app."""

    def handle(self, conn: Any) -> Any:
        """One request of a connection, in a thread of its own. A head that takes too long ends as a closed peer.

        gunicorn's threads wait for a head without any deadline: as many slow clients as threads would stop the service.
        """
        gateway: Gateway | None = getattr(self.app, "gateway", None)
        if gateway is None:
            return super().handle(conn)
        with gateway.watcher.read_deadline(conn.sock, HEAD_DEADLINE_S):
            outcome = super().handle(conn)
        if not outcome:
            conn.close(graceful=True)
        return outcome

    def _keepalive_after(self, conn: Any, keepalive: bool) -> bool:
        """Reads what is left of a refused body; gunicorn's own bound starts anew with each byte that comes."""
        gateway: Gateway | None = getattr(self.app, "gateway", None)
        if gateway is None:
            return bool(super()._keepalive_after(conn, keepalive))
        with gateway.watcher.read_deadline(conn.sock, UNREAD_BODY_S):
            return bool(super()._keepalive_after(conn, keepalive))

    def finish_request(self, conn: Any, fs: Any) -> None:
        """In the main thread, which accepts: a close may wait 2 s for the peer, so `handle` has done it already."""
        if conn.sock.fileno() < 0:
            self.nr_conns -= 1
            return
        super().finish_request(conn, fs)

    def init_process(self) -> None:
        self.log.error_log.addFilter(one_line_for_timeouts)
        super().init_process()

    def head_came(self, request: Any) -> None:
        """The deadline of the head is met; the body has its own, and each write of the answer `WRITE_DEADLINE_S`."""
        request.unreader.sock.settimeout(WRITE_DEADLINE_S)
        gateway: Gateway | None = getattr(self.app, "gateway", None)
        if gateway is not None:
            gateway.watcher.end_read_deadline(request.unreader.sock)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """SIGTERM: no new calls, and an error event for streams that do not end in time."""
        gateway: Gateway | None = getattr(self.app, "gateway", None)
        if gateway is not None:
            gateway.begin_drain()
        super().handle_exit(sig, frame)

    def handle_error(self, req: Any, client: socket.socket, addr: Any, exc: BaseException) -> None:  # noqa: ARG002
        """What could not even be parsed. The connection is closed behind it."""
        error = _error_of(exc)
        if error is None:
            self.log.exception("a request could not be read")
            error = ApiError(500, "internal_error", "an error of the server")
        body = json.dumps(error.body()).encode()
        head = (
            f"HTTP/1.1 {error.status} {_REASONS.get(error.status, 'Error')}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with contextlib.suppress(OSError):
            client.sendall(head.encode() + body)


class GatewayApplication(BaseApplication):  # type: ignore[misc]
    """gunicorn without a command line or a file of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.gateway: Gateway | None = None
        super().__init__()

    def load_config(self) -> None:
        for name, value in gunicorn_options(self._settings).items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        """Called in the worker process, after the fork: only now threads may start."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        app = create_app(self._settings)
        self.gateway = gateway_of(app)
        self.gateway.start()
        return app


def gunicorn_options(settings: Settings) -> dict[str, Any]:
    """gunicorn's settings. No control socket, no reuse_port: one listener, opened before the fork."""
    gateway = settings.gateway
    limit = gateway.max_body_bytes

    def head_came(worker: GatewayWorker, req: Any) -> None:
        """Before `100 Continue` is sent: a body that says it is too large is not asked for, nor kept alive for."""
        worker.head_came(req)
        for name, value in req.headers:
            if name == "CONTENT-LENGTH" and value.isdigit() and int(value) > limit:
                worker.log.debug("a body of %s bytes is refused", value)
                req._expected_100_continue = False
                req.force_close()

    def stop_gateway(_server: Any, worker: Any) -> None:
        own: Gateway | None = getattr(worker.app, "gateway", None)
        if own is not None:
            own.stop()

    return {
        "bind": f"{gateway.host}:{gateway.port}",
        "workers": gateway.workers,
        "worker_class": GatewayWorker,
        "threads": gateway.threads,
        "worker_connections": max(1000, gateway.threads * 4),
        "backlog": 2048,
        "keepalive": 15,
        "timeout": 60,
        "graceful_timeout": round(DRAIN_GRACE_S) + 2,
        "reuse_port": False,
        "control_socket_disable": True,
        "preload_app": False,
        "proc_name": "celeriac-gateway",
        "pre_request": head_came,
        "worker_exit": stop_gateway,
        "errorlog": "-",
        "accesslog": None,
        "limit_request_line": 8190,
        "limit_request_fields": 100,
        "limit_request_field_size": 16384,
    }


def one_line_for_timeouts(record: logging.LogRecord) -> bool:
    """A log filter: a client that does not read its answer is no defect of ours, so it gets no traceback."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, TimeoutError):
        record.msg, record.args, record.exc_info = "a client did not read its answer in time: closed", (), None
    return True


def run_gateway(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT. Never returns: gunicorn's arbiter ends the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(threadName)s %(name)s: %(message)s")
    GatewayApplication(settings).run()


def _error_of(exc: BaseException) -> ApiError | None:
    if isinstance(exc, http_errors.LimitRequestLine):
        return ApiError(414, "url_too_long", "the request line is too long")
    if isinstance(exc, http_errors.LimitRequestHeaders):
        return ApiError(431, "headers_too_large", "the headers are too many or too long")
    if isinstance(exc, http_errors.ParseException):
        return ApiError(400, "malformed_request", f"not a well-formed HTTP request: {str(exc)[:200]}")
    return None
