"""Grammars of sequences in an engine: compiled in threads beside the engine's, remembered, waited for without blocking.

    ask(constraint) --thread grammar-compiler--> matcher, kept for the next request with the same constraint
    park(sequence)  --compiled--> due(): it may be scheduled now, with a state of its own
                    --refused, or not compiled in time--> due(): it has to fail

A gateway has compiled the same before and refused what takes long, so a sequence waits here for milliseconds. The limit
in time is for requests that came another way.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from engines.structured.constraint import Constraint
from engines.structured.errors import BadConstraint
from engines.structured.grammar import Vocabulary, build_tokenizer, compile_constraint
from engines.structured.state import GrammarState

if TYPE_CHECKING:
    import llguidance

    from engines.sequence import Sequence
    from kvstore.clock import Clock

NUM_THREADS: Final = 2
MAX_REMEMBERED: Final = 256
WAIT_S: Final = 10.0
LOOK_S: Final = 0.002


@dataclass(frozen=True, slots=True)
class Due:
    """A sequence that waited for its grammar. `failure` is "" if it has one now."""

    sequence: Sequence
    code: str = ""
    failure: str = ""


class GrammarCompiler:
    """Owned by the engine thread; only the compiling itself happens elsewhere.

    What is compiled is found again by the constraint alone: an engine has one tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary, clock: Clock) -> None:
        self._vocabulary = vocabulary
        self._clock = clock
        self._pool: ThreadPoolExecutor | None = None
        self._tokenizer: Future[llguidance.LLTokenizer] | None = None
        self._compiled: OrderedDict[Constraint, Future[llguidance.LLMatcher]] = OrderedDict()
        self._parked: dict[tuple[str, int], tuple[Sequence, float]] = {}

    def ask(self, constraint: Constraint | None) -> None:
        """Begin to compile, unless it was asked for before. Returns at once."""
        if constraint is not None:
            self._future(constraint)

    def is_ready(self, sequence: Sequence) -> bool:
        """Whether it can be scheduled: it has its state now, or needs none."""
        constraint = sequence.params.constraint
        if constraint is None or sequence.grammar is not None:
            return True
        future = self._future(constraint)
        if not future.done() or future.exception() is not None:
            return False
        sequence.grammar = GrammarState(future.result().deep_copy())
        return True

    def park(self, sequence: Sequence) -> None:
        """`due` gives it back."""
        self._parked[sequence.seq_id] = (sequence, self._clock() + WAIT_S)

    def forget(self, seq_id: tuple[str, int]) -> None:
        """A parked sequence ended. Safe to repeat."""
        self._parked.pop(seq_id, None)

    def due(self) -> list[Due]:
        """Parked sequences whose waiting is over, in the order they came."""
        if not self._parked:
            return []
        found: list[Due] = []
        for sequence, until_s in list(self._parked.values()):
            due = self._look(sequence, until_s)
            if due is not None:
                del self._parked[sequence.seq_id]
                found.append(due)
        return found

    def next_wakeup_s(self) -> float | None:
        """When to call `due` again, or None while nobody waits."""
        return self._clock() + LOOK_S if self._parked else None

    def _look(self, sequence: Sequence, until_s: float) -> Due | None:
        constraint = sequence.params.constraint
        assert constraint is not None
        future = self._future(constraint)
        if not future.done():
            if self._clock() < until_s:
                return None
            message = f"the structured output was not compiled within {WAIT_S:g} s; expected less, use a simpler one"
            return Due(sequence, "schema_too_complex", message)
        error = future.exception()
        if error is None:
            assert self.is_ready(sequence)
            return Due(sequence)
        if isinstance(error, BadConstraint):
            return Due(sequence, error.code, f"the structured output cannot be compiled: {error.message}")
        return Due(sequence, "internal_error", f"compiling the structured output failed: {error!r}"[:300])

    def _future(self, constraint: Constraint) -> Future[llguidance.LLMatcher]:
        future = self._compiled.get(constraint)
        if future is None:
            if self._pool is None or self._tokenizer is None:
                self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar-compiler")
                self._tokenizer = self._pool.submit(build_tokenizer, self._vocabulary)
            future = self._compiled[constraint] = self._pool.submit(_compile, constraint, self._tokenizer)
            if len(self._compiled) > MAX_REMEMBERED:
                self._compiled.popitem(last=False)
        else:
            self._compiled.move_to_end(constraint)
        return future


def _compile(constraint: Constraint, tokenizer: Future[llguidance.LLTokenizer]) -> llguidance.LLMatcher:
    # The tokenizer was submitted first, so it has a thread already and this wait ends.
    return compile_constraint(constraint, tokenizer.result())
