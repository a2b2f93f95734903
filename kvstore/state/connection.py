"""One state server behind redis-py: short timeouts, reconnects, the library loaded where it is missing, typed errors.

redis-py does not type `execute_command`; `_run` is the one place that knows.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from kvstore.errors import StateError, StateUnavailable
from kvstore.outage import OutageLog
from kvstore.state.library import Library, build_of

_log = logging.getLogger(__name__)

MAX_BLOCK_S: Final = 2.0
MAX_CONNECTIONS: Final = 64  # of one process; a call takes about a millisecond, so a short wait serves many threads
_NO_FUNCTION: Final = "Function not found"
Argument = str | bytes | int | float
_T = TypeVar("_T")

# Replies that mean "not now" or "not here": the caller repeats, within its own deadline. redis-py knows the first
# ones as classes; for the rest the code is the first word of the message.
_LATER: Final = (
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
    redis.exceptions.MasterDownError,
    redis.exceptions.ClusterDownError,
    redis.exceptions.TryAgainError,
    redis.exceptions.NoPermissionError,
)
_LATER_CODES: Final = frozenset(
    {"BUSY", "LOADING", "READONLY", "OOM", "MISCONF", "NOREPLICAS", "MASTERDOWN", "NOAUTH", "WRONGPASS", "NOPERM"}
)


class Connection:
    """Calls on one server. Thread-safe: each call takes a connection out of the pool, or waits for one."""

    def __init__(self, url: str, *, library: Library, timeout_s: float) -> None:
        self._library = library
        self._outage = OutageLog(_log, "state server")
        self._client = _client(url, timeout_s=timeout_s)
        # A blocking read may rest for MAX_BLOCK_S; a shared timeout that long would hide a hanging server elsewhere.
        self._blocking = _client(url, timeout_s=timeout_s + MAX_BLOCK_S)

    def close(self) -> None:
        """Closes the idle connections. Calls in flight end as StateUnavailable or as usual."""
        self._client.close()
        self._blocking.close()

    def call(self, function: str, key: str, *arguments: Argument) -> Any:
        """One function of the library.

        Raises:
            StateUnavailable: no usable reply; repeat with the same arguments.
            StateError: the server refuses the call as such.
        """
        name = f"{self._library.name}_{function}"
        return self._guarded(name, lambda: _run(self._client, "FCALL", name, 1, key, *arguments))

    def call_each(self, function: str, calls: Sequence[tuple[str, Sequence[Argument]]]) -> list[Any]:
        """One function on several shards (key, arguments), in one pipeline. Raises as `call`."""
        if len(calls) == 1:
            return [self.call(function, calls[0][0], *calls[0][1])]
        name = f"{self._library.name}_{function}"

        def send() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for key, arguments in calls:
                _run(pipeline, "FCALL", name, 1, key, *arguments)
            return list(pipeline.execute())

        return self._guarded(name, send)

    def call_apart(self, function: str, calls: Sequence[tuple[str, Sequence[Argument]]]) -> list[Any]:
        """One function for several items (key, arguments), in one pipeline; each is a call of its own on the server.

        A StateError in a reply's place: the server refuses that one call as such. Raises StateUnavailable, as `call`,
        for all of them: any may have been executed.
        """
        if len(calls) == 1:  # without the pipeline's 12 us
            try:
                return [self.call(function, calls[0][0], *calls[0][1])]
            except StateUnavailable:
                raise
            except StateError as error:
                return [error]
        name = f"{self._library.name}_{function}"

        def send() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for key, arguments in calls:
                _run(pipeline, "FCALL", name, 1, key, *arguments)
            return [_refusal(name, reply) or reply for reply in pipeline.execute(raise_on_error=False)]

        return self._guarded(name, send)

    def command(self, *words: Argument) -> Any:
        """One plain command. Raises as `call`."""
        return self._guarded(str(words[0]), lambda: _run(self._client, *words))

    def pipeline(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Several plain commands in one round trip. Raises as `call`."""

        def send() -> list[Any]:
            pipeline = self._client.pipeline(transaction=False)
            for words in commands:
                _run(pipeline, *words)
            return list(pipeline.execute())

        return self._guarded("pipeline", send)

    def read_streams(self, positions: dict[str, str], *, block_ms: int) -> Any:
        """XREAD of `positions` (stream -> id), blocking for at most `MAX_BLOCK_S` (0: not at all). Raises as `call`."""
        words: list[Argument] = ["XREAD", "COUNT", 1000]
        if block_ms > 0:
            words += ["BLOCK", min(block_ms, round(MAX_BLOCK_S * 1000))]
        words += ["STREAMS", *positions.keys(), *positions.values()]
        return self._guarded("XREAD", lambda: _run(self._blocking, *words))

    def ping(self) -> float:
        """Round trip, seconds. Raises as `call`."""
        started = time.monotonic()
        self.command("PING")
        return time.monotonic() - started

    def load_library(self) -> None:
        """Loads the functions unless the server has this build or a newer one. Raises as `call`."""
        self._guarded("FUNCTION LOAD", self._load, may_load=False)

    def _load(self) -> None:
        found = _run(self._client, "FUNCTION", "LIST", "LIBRARYNAME", self._library.name, "WITHCODE")
        if found:
            code = _library_code(found[0])
            if code == self._library.source or build_of(code) > self._library.build:
                return
        _run(self._client, "FUNCTION", "LOAD", "REPLACE", self._library.source)
        _log.info("loaded function library %s build %d", self._library.name, self._library.build)

    def _guarded(self, name: str, send: Callable[[], _T], *, may_load: bool = True) -> _T:
        """`send()` with typed errors. The one place that tells an outage: callers repeat in silence."""
        try:
            reply = self._typed(name, send, may_load=may_load)
        except StateUnavailable as error:
            self._outage.failed(name, error.reason)
            raise
        self._outage.answered()
        return reply

    def _typed(self, name: str, send: Callable[[], _T], *, may_load: bool) -> _T:
        try:
            return send()
        except redis.exceptions.TimeoutError as error:
            raise StateUnavailable(command=name, reason="timeout", detail=str(error)) from error
        except redis.exceptions.ReadOnlyError as error:
            # A replica since the failover: reconnect, the address may lead to the new primary.
            self._client.connection_pool.disconnect(inuse_connections=False)
            raise StateUnavailable(command=name, reason="readonly", detail=str(error)) from error
        except _LATER as error:
            raise StateUnavailable(command=name, reason=_code(error), detail=str(error)) from error
        except redis.exceptions.ConnectionError as error:
            raise StateUnavailable(command=name, reason="connection", detail=str(error)) from error
        except redis.exceptions.ResponseError as error:
            if may_load and _NO_FUNCTION in str(error):
                self.load_library()
                return self._typed(name, send, may_load=False)
            if _code(error).upper() in _LATER_CODES:
                raise StateUnavailable(command=name, reason=_code(error), detail=str(error)) from error
            raise _refused(name, error) from error
        except redis.exceptions.RedisError as error:
            raise StateError(f"{name} failed: {type(error).__name__}: {error}", command=name) from error


def _client(url: str, *, timeout_s: float) -> redis.Redis:
    # A pool that makes callers wait: redis-py's usual one refuses the 101st call at a time, a gateway has more threads.
    pool = redis.BlockingConnectionPool.from_url(
        url,
        max_connections=MAX_CONNECTIONS,
        timeout=timeout_s,
        protocol=2,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        socket_keepalive=True,
        health_check_interval=15,
        # One repeat mends a connection that the server closed while it lay in the pool. A timeout is not repeated
        # here: the caller knows whether it still has the time.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.exceptions.ConnectionError,)),
    )
    return redis.Redis.from_pool(pool)


def _run(client: redis.Redis, *words: Argument) -> Any:
    return client.execute_command(*words)  # type: ignore[no-untyped-call]


def _refused(name: str, error: Exception) -> StateError:
    return StateError(f"{name} was refused by the state server: {error}", command=name)


def _refusal(name: str, reply: Any) -> StateError | None:
    """None for a reply that is no error. Raises an error that concerns more than this one call."""
    if not isinstance(reply, Exception):
        return None
    is_general = isinstance(reply, _LATER) or _code(reply).upper() in _LATER_CODES or _NO_FUNCTION in str(reply)
    if is_general or not isinstance(reply, redis.exceptions.ResponseError):
        raise reply
    return _refused(name, reply)


def _code(error: Exception) -> str:
    """The server's error code in lower case; for redis-py's own classes, from their name."""
    if isinstance(error, _LATER):
        return type(error).__name__.removesuffix("Error").lower()
    return str(error).split(" ", 1)[0].rstrip(":").lower()


def _library_code(description: Any) -> str:
    """`library_code` out of FUNCTION LIST's answer: a flat list of names and values, or a dict."""
    pairs = (
        description if isinstance(description, dict) else dict(zip(description[::2], description[1::2], strict=False))
    )
    code = pairs.get(b"library_code", b"")
    return code.decode() if isinstance(code, bytes) else str(code)
