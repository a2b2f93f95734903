"""One engine of the gate: a model on chosen backends, its sequences cut up in a chosen way, every logit kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from engines.factory import build_engine_model
from engines.graphs.capture import GraphMaker
from engines.kv_region import KVTensor
from engines.linear import amx
from engines.models.llama import LlamaModel
from engines.params import SamplingParams
from engines.runner import ModelRunner
from engines.scheduler import DecodeScheduler, PrefillScheduler
from engines.sequence import Sequence
from engines.step_rows import SampledTokens
from kvstore.blocks import BlockPool, PrefixCache
from tests.unit.engines.engine_loop import Loop, make_sequence

NUM_BLOCKS, BLOCK_SIZE, NUM_OUTPUT = 320, 8, 6
PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_OUTPUT, ignore_eos=True)


@dataclass(frozen=True)
class Output:
    """Tokens of one prompt, and the logits `[num tokens, vocab]` that each was chosen by."""

    token_ids: list[int]
    logits: Tensor


class GateLoop(Loop):
    """A loop that keeps the logits of what it samples, by request and index of the token."""

    def step(self, scheduler: DecodeScheduler | PrefillScheduler) -> list[SampledTokens]:
        sampled = super().step(scheduler)
        rows = self.recorder.take() if sampled else []
        for item, row in zip(sampled, rows, strict=True):
            sequence = item.sequence
            self.logits[sequence.rid, len(sequence.output_token_ids) - 1] = row
        return sampled

    @classmethod
    def of(cls, model: LlamaModel, *, caches: bool, device: str = "cpu", graphs: GraphMaker | None = None) -> GateLoop:
        config = model.config
        num_blocks = NUM_BLOCKS + (graphs is not None)  # and one that the pool never hands out
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        region = KVTensor(torch.full(shape, float("nan"), dtype=model.dtype, device=device))
        pool = BlockPool(NUM_BLOCKS)
        blocks = pool.allocate(NUM_BLOCKS)
        pool.free(blocks[1::2])  # tables with holes and in no order
        pool.free(blocks[::2][::-1])
        recorder = Recorder(model)
        runner = ModelRunner(
            recorder, region, device=device, dtype=model.dtype, graphs=graphs, scratch_block=NUM_BLOCKS
        )
        loop = cls(runner, region, pool, PrefixCache(pool, BLOCK_SIZE) if caches else None, BLOCK_SIZE)
        loop.recorder, loop.logits = recorder, {}
        return loop

    recorder: Recorder
    logits: dict[tuple[str, int], Tensor]


class Recorder(LlamaModel):
    """The same model, made of the same parts; it remembers the logits that it gave last."""

    def __init__(self, model: LlamaModel) -> None:
        self.__dict__.update(model.__dict__)
        self._last: Tensor | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        self._last = super().logits(hidden)
        return self._last

    def logits_and_peaks(self, hidden: Tensor, *, with_maxima: bool = False) -> tuple[Tensor, list[int], list[int]]:
        found = super().logits_and_peaks(hidden, with_maxima=with_maxima)
        self._last = found[0]
        return found

    def take(self) -> list[Tensor]:
        assert self._last is not None
        rows, self._last = list(self._last.cpu()), None
        return rows


@cache
def gate_model(
    folder: Path, linear: str, attention: str, dtype: torch.dtype, *, deterministic: bool = False, device: str = "cpu"
) -> LlamaModel:
    """`attention` by name, also beside native linears: an engine's attention gets the kernels that the model has.

    `linear`: as the setting, so `native` is on AMX where the CPU has it; `tiles` is native on emulated AMX everywhere.
    """
    needs_kernels = linear in ("native", "tiles") or attention == "native"
    with mock.patch.dict(os.environ, {amx.VARIABLE: "emulate"} if linear == "tiles" else {}):
        model, _ = build_engine_model(
            folder,
            dtype=dtype,
            device=device,
            linear="native" if linear == "tiles" else linear,
            kernels="native" if needs_kernels else "torch",
            deterministic=deterministic,
        )
    assert isinstance(model, LlamaModel)
    if attention == "torch":
        model.kernels = None
    return model


def run_case(
    model: LlamaModel,
    prompts: list[list[int]],
    case: Mapping[str, str],
    device: str = "cpu",
    graphs: GraphMaker | None = None,
) -> list[Output]:
    """All prompts as `case` says: `chunk`, `max_seqs`, `cache` off, cold or warm, `role` both or handed, `threads`."""
    torch.set_num_threads(int(case["threads"]))
    try:
        loop = GateLoop.of(model, caches=case["cache"] != "off", device=device, graphs=graphs)
        if case["cache"] == "warm":
            _generate(loop, prompts, case, "warm")
            loop.logits.clear()
        outputs = _generate(loop, prompts, case, "r")
        if case["cache"] == "off":
            assert loop.pool.num_used == 0
        return outputs
    finally:
        torch.set_num_threads(1)


def recover(model: LlamaModel, prompt: list[int], output_ids: list[int], chunk: int) -> Output:
    """What an engine gives that only knows the prompt and the tokens so far: it computes their KV again, in chunks."""
    loop = GateLoop.of(model, caches=False)
    sequence = make_sequence("r", prompt, PARAMS)
    sequence.output_token_ids = list(output_ids)
    loop.generate([sequence], max_num_batched_tokens=chunk)
    indices = range(len(output_ids), NUM_OUTPUT)
    return Output(sequence.output_token_ids, torch.stack([loop.logits["r", k] for k in indices]))


def _generate(loop: GateLoop, prompts: list[list[int]], case: Mapping[str, str], name: str) -> list[Output]:
    sequences = [make_sequence(f"{name}{i}", prompt, PARAMS) for i, prompt in enumerate(prompts)]
    limits = {"max_num_batched_tokens": int(case["chunk"]), "max_num_seqs": int(case["max_seqs"])}
    if case["role"] == "both":
        loop.generate(sequences, **limits)
    else:
        _hand_over(loop, sequences, limits)
    return [
        Output(each.output_token_ids, torch.stack([loop.logits[each.rid, k] for k in range(NUM_OUTPUT)]))
        for each in sequences
    ]


def _hand_over(loop: GateLoop, sequences: list[Sequence], limits: dict[str, int]) -> None:
    """Prefill by one scheduler; then only whole blocks of KV, copied elsewhere, reach the decode scheduler."""
    prefill = loop.prefill_scheduler(max_num_batched_tokens=limits["max_num_batched_tokens"])
    decode = loop.decode_scheduler(**limits)
    for sequence in sequences:
        prefill.add(sequence)
    for _ in range(10_000):
        if not prefill.num_running and not prefill.num_waiting:
            break
        for item in loop.step(prefill):
            move_blocks(loop, item.sequence)
            decode.add(item.sequence)
    loop.run_to_end(decode, sequences)


def move_blocks(loop: GateLoop, sequence: Sequence) -> None:
    """Other blocks with the same content; a tail that is not the sequence's own leaves as zeros."""
    if offset := sequence.num_computed_tokens % BLOCK_SIZE:
        loop.runner.zero_tail(sequence.block_table[-1], offset)
    blocks = loop.pool.allocate(len(sequence.block_table))
    loop.runner.copy_blocks(list(zip(sequence.block_table, blocks, strict=True)))
    assert not loop.region.kv[blocks].isnan().any()
    loop.pool.free(sequence.block_table)
    sequence.block_table = blocks
