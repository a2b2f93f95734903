"""Where one sequence stands in its grammar, and the masks of many at once.

A state is a pure function of the output ids: it takes in what is new each time it is asked, and starts over when the
ids are others than before. So a sequence that was handed over, preempted or recovered goes on exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import llguidance
import numpy as np
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray


class GrammarState:
    """Owned by the engine thread, for one sequence.

    Attributes:
        failure: why no token can follow any more, once that is so. The sequence has to end.
    """

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        """`matcher` at its beginning; it belongs to this state from here on."""
        self.matcher = matcher
        self.failure = ""
        self._source: Sequence[int] = ()
        self._ids: list[int] = []

    def follow(self, output_ids: Sequence[int]) -> None:
        """Take in `output_ids`, all of them; those of a list that only grew are not looked at again."""
        if self._source is not output_ids or len(output_ids) < len(self._ids):
            if list(output_ids[: len(self._ids)]) != self._ids:
                self.matcher.reset()
                self._ids = []
            self._source = output_ids
        new = list(output_ids[len(self._ids) :])
        if new and not self.matcher.consume_tokens(new):
            self.fail("its tokens so far do not match it")
        self._ids += new

    def num_allowed(self, output_ids: Sequence[int], guesses: list[int]) -> int:
        """How many of `guesses`, from the first on, may follow `output_ids`."""
        self.follow(output_ids)
        return 0 if self.failure else self.matcher.validate_tokens(guesses)

    def fork(self) -> GrammarState:
        """A state of its own that stands where this one does."""
        state = GrammarState(self.matcher.deep_copy())
        state.failure, state._ids = self.failure, self._ids[:]
        return state

    def fail(self, why: str) -> None:
        if not self.failure:
            self.failure = f"the structured output cannot go on: {why}"


class GrammarMasks:
    """Computes masks. Owned by the engine thread; keeps one buffer from step to step.

    Args:
        vocab_size: width of the logits.
        num_threads: threads that compute masks of different sequences.
    """

    def __init__(self, vocab_size: int, num_threads: int) -> None:
        self._executor = llguidance.LLExecutor(num_threads=max(1, num_threads))
        self._bits = np.zeros((0, -(-vocab_size // 32)), dtype=np.int32)

    def forbidden(self, states: Sequence[GrammarState]) -> NDArray[np.uint8]:
        """`[num_states, bytes]`, a bit per token from the lowest on: 1 is forbidden next. All 1 for a failed state.

        A state may occur several times (choices that have no tokens yet).
        """
        row_of = {id(state): i for i, state in reversed(list(enumerate(states)))}
        if len(states) > len(self._bits):
            self._bits = np.zeros((len(states), self._bits.shape[1]), dtype=np.int32)
        bits = self._bits[: len(states)]
        firsts = [(states[i].matcher, i) for i in sorted(row_of.values())]
        fill_next_token_bitmask_par(self._executor, firsts, bits)
        for i, state in enumerate(states):
            first = row_of[id(state)]
            if first != i:
                bits[i] = bits[first]
            elif state.matcher.is_error():
                state.fail(state.matcher.get_error()[:200])
            if state.failure:
                bits[i] = 0
        return np.invert(bits).view(np.uint8)
