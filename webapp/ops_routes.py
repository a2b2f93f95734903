"""What operators and load balancers ask: /health, /ping, /ready, /version, /metrics."""

from __future__ import annotations

from flask import Blueprint, Response
from prometheus_client import CONTENT_TYPE_LATEST

from kvstore.errors import KVStoreError
from webapp.app import VERSION, gateway_of, json_answer, no_options
from webapp.gateway import Gateway

routes = Blueprint("ops", __name__)


@routes.get("/health", endpoint="health", **no_options())
@routes.get("/ping", endpoint="health", **no_options())
def health() -> Response:
    """This process lives. Asks nobody else."""
    return Response(status=200)


@routes.get("/ready", **no_options())
def ready() -> Response:
    """Whether a request sent now would be served."""
    checks = ready_checks(gateway_of())
    is_ready = all(checks.values())
    return json_answer({"ready": is_ready, "checks": checks}, 200 if is_ready else 503)


@routes.get("/version", **no_options())
def version() -> Response:
    """Version of the program, identity of the model."""
    gateway = gateway_of()
    model = gateway.model
    return json_answer(
        {
            "version": VERSION,
            "protocol": "celeriac1",
            "models": {model.name: {"fingerprint": model.fingerprint, "tokenizer": model.tokenizer.digest}},
        }
    )


@routes.get("/metrics", **no_options())
def metrics() -> Response:
    """Prometheus text of this process."""
    return Response(gateway_of().metrics.text(), content_type=CONTENT_TYPE_LATEST)


def ready_checks(gateway: Gateway) -> dict[str, bool]:
    """Each condition of readiness: the state server answers, prompts and outputs have a worker, no shutdown."""
    try:
        beats = [b for b in gateway.store.workers() if b.model == gateway.model.name and not b.draining]
        has_redis = True
    except KVStoreError:
        beats, has_redis = [], False
    roles = {beat.role for beat in beats}
    return {
        "redis": has_redis,
        "prefill": bool(roles & {"prefill", "both"}),
        "decode": bool(roles & {"decode", "both"}),
        "accepting": not gateway.admission.is_draining,
    }
