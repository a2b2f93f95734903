"""What can go wrong with a constraint, as one tree.

ConstraintError(retryable)
├── BadConstraint      the constraint itself: HTTP 400 at submission
└── CheckerBusy        no checker process was free in time: HTTP 503                                  (retryable)
"""

from __future__ import annotations


class ConstraintError(Exception):
    """Base of all errors of this package."""

    retryable: bool = False


class BadConstraint(ConstraintError):
    """A constraint that cannot be served.

    Attributes:
        code: invalid_value | unsupported | schema_too_complex.
        pointer: JSON pointer (RFC 6901) of the fault inside of a schema; "" is its root or no schema at all.
    """

    def __init__(self, code: str, message: str, *, pointer: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.pointer = pointer


class CheckerBusy(ConstraintError):
    """Every checker process was at work for longer than a caller can wait."""

    retryable = True

    def __init__(self, *, waited_s: float) -> None:
        super().__init__(
            f"no checker of structured outputs was free within {waited_s:g} s. Expected one sooner; "
            "send the request again."
        )
        self.waited_s = waited_s
