"""Which destination blocks of a transfer can go out, while source blocks are still being computed. Pure.

source, 16       [ 0 | 1 | 2 | 3 ]     pushed so far; 3 is the newest, it may be filled only in part
destination, 32  [ 0     | 1     ]     0 goes now, 1 when block 4 is pushed or the transfer is committed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kvstore.reshard.plan import Conversion

Part = tuple[int, int, int]  # destination place, layers [lo, hi)


class Progress:
    """Of one transfer over a link that converts.

    Attributes:
        table: source block by its position in the sequence, as pushed so far.
    """

    def __init__(self, conversion: Conversion) -> None:
        self.table: dict[int, int] = {}
        self._conversion = conversion
        self._pushed: dict[int, int] = {}  # position -> a bit for each layer
        self._sent: dict[int, int] = {}  # place -> a bit for each layer
        self._first_open = 0  # no place before it has anything to send

    def push(self, pairs: Sequence[tuple[int, int]], layer_lo: int, layer_hi: int) -> Iterator[Part]:
        """Source blocks (block, position) have layers [lo, hi); yields what became whole by it.

        A destination block that takes something of the newest source block waits: its tokens may end anywhere.
        """
        layers = (1 << layer_hi) - (1 << layer_lo)
        for block, position in pairs:
            self._place(block, position)
            self._pushed[position] = self._pushed.get(position, 0) | layers
        c = self._conversion
        end = max(self.table, default=0) * c.source.block_size // c.destination.block_size
        whole = (1 << c.source.num_layers) - 1
        for place in range(self._first_open, end):
            sent = self._sent.get(place, 0)
            if not sent & layers and all(self._pushed.get(at, 0) & layers == layers for at in self._sources(place)):
                self._sent[place] = sent | layers
                yield place, layer_lo, layer_hi
            if self._sent.get(place, 0) == whole and place == self._first_open:
                self._first_open += 1

    def finish(self, src_blocks: Sequence[int], num_tokens: int) -> Iterator[Part]:
        """All of the sequence is there: what has not gone yet."""
        for position, block in enumerate(src_blocks):
            self._place(block, position)
        num_layers = self._conversion.source.num_layers
        for place in range(self._first_open, self._conversion.blocks_for(num_tokens)):
            sent = self._sent.get(place, 0)
            layer = 0
            while layer < num_layers:
                lo = layer
                while layer < num_layers and not sent >> layer & 1:
                    layer += 1
                if lo < layer:
                    yield place, lo, layer
                layer += 1
            self._sent[place] = (1 << num_layers) - 1

    def _place(self, block: int, position: int) -> None:
        """Another block than before: whatever was made of the former one must go again."""
        before = self.table.get(position, block)
        self.table[position] = block
        if before != block:
            src, dst = self._conversion.source.block_size, self._conversion.destination.block_size
            self._pushed[position] = 0
            for place in range(position * src // dst, -(-(position + 1) * src // dst)):
                self._sent[place] = 0
                self._first_open = min(self._first_open, place)

    def _sources(self, place: int) -> range:
        """Positions of the source blocks that a destination block is made of."""
        src, dst = self._conversion.source.block_size, self._conversion.destination.block_size
        return range(place * dst // src, -(-(place + 1) * dst // src))
