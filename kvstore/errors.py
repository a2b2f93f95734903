"""What can go wrong in `kvstore`, as one tree.

    KVStoreError(retryable)
    ├── StateError                 an answer of the state server that no caller expects: a bug, or a foreign server
    │   ├── StateUnavailable       no answer, or one that says "later": repeat the same call          (retryable)
    │   └── BadRecord              a key of another type, another schema, or garbled: fail that request
    ├── ServerNotStarted           the embedded server did not come up
    └── NativeUnavailable          C++ that could not be compiled; what calls it has a slower counterpart

Errors of blocks and transports derive from `KVStoreError` in their own packages.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of all errors of this package. `retryable`: the same call may succeed later, unchanged."""

    retryable: bool = False


class StateError(KVStoreError):
    """The state server answered with something that the protocol does not know."""

    def __init__(self, message: str, *, command: str = "") -> None:
        super().__init__(message)
        self.command = command


class StateUnavailable(StateError):
    """No reply, or a reply that says "not now" (loading, read-only, out of memory, no permission).

    It is unknown whether the call was executed. Every call is safe to repeat with the same arguments.

    Attributes:
        reason: `timeout`, `connection`, or the server's own code in lower case (`loading`, `readonly`, `oom`, ...).
    """

    retryable = True

    def __init__(self, *, command: str, reason: str, detail: str) -> None:
        super().__init__(
            f"{command}: the state server gave no usable reply ({reason}: {detail}). "
            "Expected a writable Redis >= 7 or Valkey >= 7.2; repeat the same call, or check `redis_url`.",
            command=command,
        )
        self.reason = reason
        self.detail = detail


class BadRecord(StateError):
    """A key that the protocol owns holds something that it cannot read. Only this request is harmed: fail it."""

    def __init__(self, *, rid: str, why: str) -> None:
        super().__init__(
            f"Request {rid} has an unreadable record: {why}. Expected what this version of the protocol writes; "
            "fail the request and look at the keys `cel:*<rid>*` of the state server."
        )
        self.rid = rid
        self.why = why


class ServerNotStarted(KVStoreError):
    """The embedded server exited or did not answer in time. `log_tail` holds its last lines."""

    def __init__(self, *, what: str, log_tail: str = "") -> None:
        super().__init__(
            f"The embedded Valkey did not start: {what}. Expected a server that answers PING; "
            f"free the port, or point `redis_url` at a server of your own.\n{log_tail}".rstrip()
        )
        self.what = what
        self.log_tail = log_tail


class NativeUnavailable(KVStoreError):
    """C++ cannot be compiled on this machine."""

    def __init__(self, *, why: str, hint: str) -> None:
        super().__init__(f"No compiled C++: {why}. {hint}")
        self.why = why
        self.hint = hint
