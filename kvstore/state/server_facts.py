"""What kind of server a URL leads to, for the checks before anything starts."""

from __future__ import annotations

from dataclasses import dataclass

import redis

from kvstore.errors import StateUnavailable


@dataclass(frozen=True)
class ServerFacts:
    """`version` as the server counts it: a Valkey says its own, not the Redis version it imitates."""

    is_valkey: bool
    version: tuple[int, ...]
    pid: int
    role: str
    is_cluster: bool
    maxmemory_policy: str
    maxmemory_bytes: int
    appendonly: bool

    @property
    def name(self) -> str:
        return f"{'Valkey' if self.is_valkey else 'Redis'} {'.'.join(map(str, self.version))}"


def server_facts(url: str, *, timeout_s: float = 2.0) -> ServerFacts:
    """One INFO.

    Raises:
        StateUnavailable: nobody answers there, or not to us.
    """
    try:
        with redis.Redis.from_url(
            url, protocol=2, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        ) as client:
            info = client.info()
    except redis.exceptions.RedisError as error:
        raise StateUnavailable(command="INFO", reason="connection", detail=str(error)) from error
    version = str(info.get("valkey_version") or info.get("redis_version") or "0")
    return ServerFacts(
        is_valkey="valkey_version" in info,
        version=tuple(int(part) for part in version.split(".") if part.isdigit()),
        pid=int(info.get("process_id", 0)),
        role=str(info.get("role", "")),
        is_cluster=bool(info.get("cluster_enabled", 0)),
        maxmemory_policy=str(info.get("maxmemory_policy", "noeviction")),
        maxmemory_bytes=int(info.get("maxmemory", 0)),
        appendonly=bool(info.get("aof_enabled", 0)),
    )
