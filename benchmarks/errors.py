"""What can go wrong in `benchmarks`.

BenchError                the message says what was expected and what to do
├── BadDistribution       a length distribution that cannot be read
├── ServerUnusable        the server under test does not answer as needed          (retryable)
└── ClusterNotStarted     `celeriac up` failed
"""

from __future__ import annotations


class BenchError(Exception):
    """Base of all errors of this package."""

    retryable: bool = False


class BadDistribution(BenchError):
    """A length distribution that cannot be read."""

    def __init__(self, text: str, problem: str) -> None:
        super().__init__(
            f"length {text!r}: {problem}. Expected N, `uniform:LOW-HIGH`, or `lognormal:MEDIAN,SIGMA[,MAX]` (tokens)."
        )
        self.text = text
        self.problem = problem


class ServerUnusable(BenchError):
    """The server under test does not answer, or not as an OpenAI-compatible server does."""

    retryable = True

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"{url}: {problem}. Expected a running gateway (`celeriac up` prints its address).")
        self.url = url
        self.problem = problem


class ClusterNotStarted(BenchError):
    """`celeriac up` failed; its last words are in the message."""

    def __init__(self, command: str, output: str) -> None:
        super().__init__(f"`{command}` failed:\n{output}")
        self.command = command
        self.output = output
