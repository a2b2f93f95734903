"""When a process of the cluster counts as ready: a worker by its beat, gateway and Flower by an answer over HTTP."""

from __future__ import annotations

import http.client
from collections.abc import Mapping

from compose.layout import ChildSpec
from configs.schema import Settings
from kvstore.state.records import WorkerBeat

HTTP_TIMEOUT_S = 2.0


def gateway_url(settings: Settings) -> str:
    return f"http://{_reachable(settings.gateway.host)}:{settings.gateway.port}"


def flower_url(settings: Settings) -> str:
    return f"http://{_reachable(settings.flower.host)}:{settings.flower.port}"


def is_ready(spec: ChildSpec, pid: int, beats: Mapping[int, WorkerBeat], settings: Settings) -> bool:
    """Looks once. Waits at most `HTTP_TIMEOUT_S`."""
    if spec.kind == "worker":
        return pid in beats and bool(beats[pid].engine_pids)
    if spec.kind == "gateway":
        return http_status(settings.gateway.host, settings.gateway.port, "/ready") == 200
    return http_status(settings.flower.host, settings.flower.port, "/healthcheck") in (200, 401)


def http_status(host: str, port: int, path: str) -> int:
    """Status of a GET, 0 if nobody answers. No proxy is asked, whatever the environment says."""
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=HTTP_TIMEOUT_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _reachable(host: str) -> str:
    """An address to connect to, of one to listen on."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
