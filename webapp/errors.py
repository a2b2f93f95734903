"""What a caller can be told. One tree; each error knows its HTTP status and its stable words.

ApiError(status, type, code, param, headers, retryable)
├── InvalidRequest     400: a field, or several
├── Overloaded         503: admission, or no worker
└── StreamFailed       the end of an accepted request that is no FINISHED
"""

from __future__ import annotations

from typing import Any, Final

TYPES: Final = {
    400: "invalid_request_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    410: "invalid_request_error",
    413: "invalid_request_error",
    414: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    499: "cancelled_error",
    500: "server_error",
    501: "server_error",
    502: "server_error",
    503: "server_error",
    504: "timeout_error",
}
MAX_PROBLEMS: Final = 10


class ApiError(Exception):
    """An answer that is an error. `message` says what came, what was expected, and what to do."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers or {}

    @property
    def retryable(self) -> bool:
        return self.status in (408, 500, 502, 503)

    def body(self) -> dict[str, Any]:
        """The JSON object, the same for answers and for error events."""
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


class InvalidRequest(ApiError):
    """A body that cannot be served."""

    def __init__(self, code: str, message: str, *, param: str | None = None) -> None:
        super().__init__(400, code, message, param=param)

    @classmethod
    def of(cls, problems: list[InvalidRequest]) -> InvalidRequest:
        """One error for all `problems`: the first decides param and code, at most 10 are told."""
        first = problems[0]
        message = "; ".join(p.message for p in problems[:MAX_PROBLEMS])
        return cls(first.code, message, param=first.param)


class Overloaded(ApiError):
    """Refused before any work was done; the caller may come again."""

    def __init__(self, code: str, message: str, *, retry_after_s: int) -> None:
        headers = {"Retry-After": str(retry_after_s), "retry-after-ms": str(retry_after_s * 1000)}
        super().__init__(503, code, message, headers=headers)


class StreamFailed(ApiError):
    """An accepted request that did not finish; in a stream it becomes an error event."""
