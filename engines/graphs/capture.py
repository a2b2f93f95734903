"""Recording the work of a function on the device, to run it again without its Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Graph(Protocol):
    """A recorded function."""

    def replay(self) -> Tensor:
        """Do the recorded work again, on the memory that it was recorded with, and return its result.

        It is the same memory each time: valid until the next replay.
        """


class GraphMaker(Protocol):
    """Owned by the engine thread."""

    def capture(self, work: Callable[[], Tensor]) -> Graph:
        """Record `work`. It may be run some times, too; its result then counts for nothing.

        Raises:
            RuntimeError: `work` does something that cannot be recorded, such as asking the device for a number.
        """


class CudaGraphs:
    """CUDA graphs. All share one pool of memory, which is right because no two run at the same time."""

    NUM_WARM_UPS = 2  # the first calls load kernels and allocate work space, which may not happen while recording

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Tensor]) -> Graph:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.NUM_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may copy KV meanwhile, and that is not part of the step.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = work()
        return _CudaGraph(graph, result)


class _CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, result: Tensor) -> None:
        self._graph = graph
        self._result = result

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._result
