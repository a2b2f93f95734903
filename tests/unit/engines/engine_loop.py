"""Scheduler and runner in one loop, as the engine process has them, without processes, transports or a clock."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engines.factory import build_engine_model
from engines.kv_region import KVTensor
from engines.params import SamplingParams
from engines.runner import ModelRunner
from engines.scheduler import DecodeScheduler, PrefillScheduler
from engines.sequence import Sequence
from engines.step_rows import SampledTokens
from kvstore.blocks import BlockPool, PrefixCache

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@dataclass
class Loop:
    """An engine whose unused KV is NaN and whose block ids are handed out in random order."""

    runner: ModelRunner
    region: KVTensor
    pool: BlockPool
    cache: PrefixCache | None
    block_size: int
    now_s: float = 0.0

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        num_blocks: int = 256,
        block_size: int = 8,
        prefix_caching: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        deterministic: bool = False,
    ) -> Loop:
        model, config = build_engine_model(folder, dtype=dtype, deterministic=deterministic)
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, block_size, config.head_dim)
        region = KVTensor(torch.full(shape, float("nan"), dtype=dtype))
        pool = BlockPool(num_blocks)
        blocks = pool.allocate(num_blocks)
        random.Random(seed).shuffle(blocks)
        for block in blocks:  # tables with holes and in no order
            pool.free([block])
        cache = PrefixCache(pool, block_size) if prefix_caching else None
        runner = ModelRunner(model, region, device="cpu", dtype=dtype)
        return cls(runner, region, pool, cache, block_size)

    def decode_scheduler(self, **limits: Any) -> DecodeScheduler:
        return DecodeScheduler(self.pool, self.cache, self.block_size, **limits)

    def prefill_scheduler(self, *, max_num_batched_tokens: int = 2048) -> PrefillScheduler:
        return PrefillScheduler(
            self.pool, self.cache, self.block_size, max_num_batched_tokens=max_num_batched_tokens, batch_wait_ms=0.0
        )

    def step(self, scheduler: DecodeScheduler | PrefillScheduler) -> list[SampledTokens]:
        self.now_s += 1.0
        plan = scheduler.schedule(self.now_s)
        assert plan is not None
        result = self.runner.run(plan)
        scheduler.complete(plan, {item.sequence.seq_id: item.token_ids for item in result.sampled})
        return result.sampled

    def generate(self, sequences: list[Sequence], **limits: Any) -> list[list[int]]:
        """Output ids of each sequence, `max_tokens` of them; all blocks are back afterwards."""
        scheduler = self.decode_scheduler(**limits)
        for sequence in sequences:
            scheduler.add(sequence)
        self.run_to_end(scheduler, sequences)
        return [sequence.output_token_ids for sequence in sequences]

    def run_to_end(self, scheduler: DecodeScheduler, sequences: list[Sequence]) -> None:
        for _ in range(10_000):
            if not scheduler.num_running and not scheduler.num_waiting:
                return
            self.step(scheduler)
            for sequence in sequences:
                if sequence.block_table and len(sequence.output_token_ids) >= sequence.params.max_tokens:
                    scheduler.remove(sequence.seq_id)
                    self.pool.free(sequence.block_table)
                    sequence.block_table = []
        raise AssertionError("the loop does not end")


def make_sequence(
    rid: str, prompt_ids: list[int], params: SamplingParams = GREEDY, *, arrival_s: float = 0.0, seed: int = 0
) -> Sequence:
    return Sequence(rid, 0, prompt_ids, params, seed, arrival_s=arrival_s)


def random_prompts(num_prompts: int, *, seed: int = 1, longest: int = 70) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 259) for _ in range(rng.randrange(1, longest))] for _ in range(num_prompts)]
