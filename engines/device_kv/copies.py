"""Copies between the KV of an engine and the slots of its bounce region. They block until the bytes are there.

save   device blocks -> slots, some layers, once the compute that wrote them is done
load   slots -> device blocks, all layers
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from engines.device_kv.gates import Gate, blocking_event, gate_of
from engines.kv_region import KVTensor
from kvstore.native.pages import Pages
from kvstore.transport import KVRegion

Pairs = Sequence[tuple[int, int]]


class Copies(Protocol):
    """`gate` is for the engine thread; one other thread may `save` while a third one may `load`."""

    def gate(self) -> Gate:
        """Everything that the engine thread has asked the device to compute so far."""
        ...

    def save(self, gate: Gate, pairs: Pairs, lo: int, hi: int) -> None:
        """Layers [lo, hi), (block, slot) each."""
        ...

    def load(self, gate: Gate, pairs: Pairs) -> None:
        """(slot, block) each."""
        ...


def copies_for(kv: KVTensor) -> Copies:
    """The fastest that there is for where `kv` lies."""
    return HostCopies(kv.kv, kv.shared) if kv.kv.device.type == "cpu" else TensorCopies(kv.kv, kv.slots)


class HostCopies:
    """KV in host memory that is not shared: what peers' pages are moved with, so no thread of torch wakes up for it."""

    def __init__(self, kv: Tensor, region: KVRegion) -> None:
        self._kv = kv  # kept alive, for its address
        self._ops = region.ops
        self._slots = region.pages
        self._blocks = Pages(kv.data_ptr(), kv.shape[0], region.num_layers, region.layer_bytes)
        self._num_layers = region.num_layers

    def gate(self) -> Gate:
        """None: what was computed before is there."""
        return None

    def save(self, gate: Gate, pairs: Pairs, lo: int, hi: int) -> None:  # noqa: ARG002
        self._copy(self._blocks, self._slots, pairs, lo, hi)

    def load(self, gate: Gate, pairs: Pairs) -> None:  # noqa: ARG002
        self._copy(self._slots, self._blocks, pairs, 0, self._num_layers)

    def _copy(self, own: Pages, peer: Pages, pairs: Pairs, lo: int, hi: int) -> None:
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self._ops.copy(own, peer, sources, targets, first=0, lo=lo, hi=hi, cells=None)


class TensorCopies:
    """By torch, for KV on any device. On a GPU each direction has a stream of its own beside that of the compute.

    Args:
        kv: `[num_blocks, num_layers, ...]`; a block is contiguous.
        slots: the same on the host, pinned if `kv` is on a GPU.
    """

    def __init__(self, kv: Tensor, slots: Tensor) -> None:
        self._kv = kv
        self._slots = slots
        is_gpu = kv.device.type == "cuda"
        self._saving = _stream(kv.device) if is_gpu else None
        self._loading = _stream(kv.device) if is_gpu else None

    def gate(self) -> Gate:
        return gate_of(self._kv.device)

    def save(self, gate: Gate, pairs: Pairs, lo: int, hi: int) -> None:
        # A slice of layers is contiguous in one block only; whole blocks that follow each other are one run.
        is_whole = (lo, hi) == (0, self._kv.shape[1])
        runs = merged(pairs) if is_whole else [(block, slot, 1) for block, slot in pairs]
        self._copy(self._saving, gate, [(self._kv, b, self._slots, s, n) for b, s, n in runs], lo, hi)

    def load(self, gate: Gate, pairs: Pairs) -> None:
        runs = [(self._slots, slot, self._kv, block, num) for slot, block, num in merged(pairs)]
        self._copy(self._loading, gate, runs, 0, self._kv.shape[1])

    def _copy(
        self,
        stream: torch.cuda.Stream | None,
        gate: Gate,
        runs: list[tuple[Tensor, int, Tensor, int, int]],
        lo: int,
        hi: int,
    ) -> None:
        with torch.inference_mode(), torch.cuda.stream(stream):
            if stream is not None and gate is not None:
                stream.wait_event(gate)
            for source, i, target, j, num in runs:
                target[j : j + num, lo:hi].copy_(source[i : i + num, lo:hi], non_blocking=True)
            if stream is not None:
                done = blocking_event()
                done.record(stream)
                done.synchronize()


def merged(pairs: Pairs) -> list[tuple[int, int, int]]:
    """Neighbours that follow each other on both sides as one run: (first source, first target, how many).

    >>> merged([(3, 0), (4, 1), (6, 2)])
    [(3, 0, 2), (6, 2, 1)]
    """
    runs: list[tuple[int, int, int]] = []
    for source, target in pairs:
        if runs and (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]) == (source, target):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((source, target, 1))
    return runs


def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
