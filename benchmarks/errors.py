"""What can go wrong in `benchmarks`.

BenchError                the message says what was expected and what to do
├── BadDistribution       a length distribution that cannot be read
├── ServerUnusable        the server under test does not answer as needed          (retryable)
├── ClusterNotStarted     `celeriac up` failed
├── ProgramFailed         a program that runs jobs for a benchmark failed
└── TooFewCores           the layout of a benchmark needs more cores
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


class ProgramFailed(BenchError):
    """A program that runs jobs for a benchmark ended, or did not answer; its last words are in the message."""

    def __init__(self, name: str, problem: str, output: str) -> None:
        super().__init__(f"{name}: {problem}. Its last words:\n{output or '(none)'}")
        self.name = name
        self.problem = problem
        self.output = output


class TooFewCores(BenchError):
    """The layout needs cores that this process may not use."""

    def __init__(self, *, needed: int, usable: int, what: str) -> None:
        super().__init__(f"{what} needs {needed} cores; this process may use {usable}. Run it on a larger machine.")
        self.needed = needed
        self.usable = usable
