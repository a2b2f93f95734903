"""What the random choice is told of each row, as arrays: made once for a batch; then only uniform numbers change."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engines.sampling.randomness import Streams
from engines.sampling.row import SamplingRow


class FilterColumns:
    """Owned by the engine thread."""

    def __init__(self) -> None:
        # The rows themselves are kept, so that none of them is freed and its place taken by another.
        self._rows: list[SamplingRow] = []
        self._ids: list[int] = []
        self._columns = np.empty((5, 0))
        self._streams = Streams([])

    def of(self, rows: list[SamplingRow]) -> NDArray[np.float64]:
        """`[5, num_rows]`: temperature, top_k, top_p, min_p, uniform. Valid until the next call."""
        ids = list(map(id, rows))
        if ids != self._ids:
            self._rows, self._ids = rows, ids
            filters = [(each.temperature, each.top_k, each.top_p, each.min_p, 0.0) for each in (r.params for r in rows)]
            self._columns = np.ascontiguousarray(np.array(filters, dtype=np.float64).T)
            self._streams = Streams([(row.seed, row.choice) for row in rows])
        self._columns[4] = self._streams.at([len(row.output_ids) for row in rows])
        return self._columns
