"""Graphs without a GPU: the tensor operations of a function are recorded once and run again on the same memory.

As with a CUDA graph, no Python of the function runs at a replay, so a number, a length or a tensor that was baked in at
the recording stays what it was; and what asks the device for a number while recording fails by name. Tests of buffers,
padding and buckets hold with these what they would hold with CUDA's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AsksTheHost(RuntimeError):
    """The function's next step depends on a number that only the device knows."""


@dataclass
class RecordedGraph:
    """Calls in their order: (operation, args, kwargs, what it gave)."""

    calls: list[tuple[Any, Any, Any, Any]] = field(default_factory=list)
    result: Tensor = field(default_factory=lambda: torch.empty(0))

    def replay(self) -> Tensor:
        for operation, args, kwargs, given in self.calls:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(given), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.result


class RecordedGraphs:
    """A `GraphMaker`. `graphs`: all that were made."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []

    def capture(self, work: Callable[[], Tensor]) -> RecordedGraph:
        graph = RecordedGraph()
        with _Recorder(graph):
            graph.result = work()
        graph.result.zero_()  # a recording computes nothing: whoever reads this has not replayed
        self.graphs.append(graph)
        return graph


class RepeatedGraphs:
    """A `GraphMaker` whose graphs call the function again: what a recording has to equal, bit for bit."""

    def capture(self, work: Callable[[], Tensor]) -> _Repeated:
        return _Repeated(work)


@dataclass
class _Repeated:
    replay: Callable[[], Tensor]


_ASKING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


def _is_mask(index: Any) -> bool:
    """How many it picks, only the device knows."""
    return isinstance(index, Tensor) and index.dtype == torch.bool


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: RecordedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKING or (func in _INDEXING and any(_is_mask(index) for index in args[1])):
            raise AsksTheHost(f"{func} while recording: a GPU would have to be waited for")
        given = func(*args, **(kwargs or {}))
        self._graph.calls.append((func, args, kwargs or {}, given))
        return given
