"""Grammar masks over the logits of a step: computed for all constrained rows at once, applied in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.structured.state import GrammarMasks

if TYPE_CHECKING:
    from engines.sampling.row import SamplingRow

# Eight tokens at once: what to add to their logits, for each byte of a mask.
_BIAS_OF_BYTE = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"), -np.inf, 0.0
).astype(np.float32)


class Constrainer:
    """Owned by the engine thread. Masks are made when the first constrained row comes."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids
        self._masks: GrammarMasks | None = None
        self._bias = np.empty((0, 8), dtype=np.float32)

    def mask(self, logits: Tensor, rows: dict[int, SamplingRow]) -> NDArray[np.uint8]:
        """Set what the grammars do not allow to -inf, in place: of the rows of `logits` (fp32) that are in `rows`.

        Returns:
            The masks, as `GrammarMasks.forbidden`.
        """
        states = [row.grammar for row in rows.values() if row.grammar is not None]
        for row, state in zip(rows.values(), states, strict=True):
            state.follow(row.output_ids)
        if self._masks is None:
            self._masks = GrammarMasks(logits.shape[1], torch.get_num_threads())
        forbidden = self._masks.forbidden(states)
        if logits.device.type != "cpu":
            _mask_on_device(logits, list(rows), forbidden)
            return forbidden
        if len(self._bias) != forbidden.shape[1]:
            self._bias = np.empty((forbidden.shape[1], 8), dtype=np.float32)
        bias, values = self._bias.reshape(-1)[: logits.shape[1]], logits.numpy()
        # Row by row, so that the bias stays in the cache; a fill by a mask of booleans took 4 to 10 times as long with
        # a vocabulary of 152,000.
        for i, row_forbidden in zip(rows, forbidden, strict=True):
            np.take(_BIAS_OF_BYTE, row_forbidden, axis=0, out=self._bias, mode="clip")
            values[i] += bias
        return forbidden

    def ends(
        self, logits: Tensor, rows: dict[int, SamplingRow], forbidden: NDArray[np.uint8], best: list[int]
    ) -> dict[int, int]:
        """Tokens of rows that have nothing left to choose: an end token each.

        Where the grammar allowed it (other masks took it away), the output ends well; else `grammar.failure` says why
        it cannot go on.

        Args:
            best: the largest logit of every row of `logits`, masks applied.
        """
        index = list(rows)
        values = logits[index, [best[i] for i in index]]
        found: dict[int, int] = {}
        for k in (values == float("-inf")).nonzero().flatten().tolist():
            state = rows[index[k]].grammar
            ends = [token for token in self._eos_token_ids if not forbidden[k, token >> 3] >> (token & 7) & 1]
            if not ends and state is not None:
                state.fail("the other fields of the request forbid every token that it allows")
            found[index[k]] = ends[0] if ends else self._eos_token_ids[0]
        return found


def _mask_on_device(logits: Tensor, rows: list[int], forbidden: NDArray[np.uint8]) -> None:
    """The masks cross as bits, an eighth of a byte per token, and are unpacked where the logits are."""
    packed = torch.from_numpy(forbidden).to(logits.device)
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=logits.device)
    is_forbidden = (bits & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill(is_forbidden, float("-inf"))
