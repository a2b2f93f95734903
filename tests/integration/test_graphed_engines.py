"""Engines as they are on a GPU, but for the GPU: KV apart from what peers map, torch's kernels, decode steps replayed.

The graphs are recordings of tensor operations that replay without any Python of the step (tests/recorded_graphs.py).
"""

from __future__ import annotations

from pathlib import Path

import pytest

import engines.build
from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair
from tests.integration.test_engine_handoff import PROMPTS
from tests.recorded_graphs import RecordedGraphs

AS_ON_A_GPU = {"kv.bounce_bytes": "32MiB", "engine.kernels": "torch", "engine.linear": "torch"}
NUM_TOKENS = 16


def test_requests_handed_over_and_decoded_by_graphs_have_the_tokens_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[RecordedGraphs] = []

    def choose(_asked: str, _device: str) -> RecordedGraphs:
        recorded.append(RecordedGraphs())
        return recorded[-1]

    monkeypatch.setattr(engines.build, "choose_graphs", choose)
    pair = EnginePair(tmp_path, TINY_CHAT, flags=AS_ON_A_GPU)
    try:
        chosen = PROMPTS[::12]
        for i, prompt in enumerate(chosen):
            pair.add(f"r{i}", prompt["prompt_ids"], max_tokens=NUM_TOKENS)
        names = {(f"r{i}", 0) for i in range(len(chosen))}
        pair.run(lambda: names <= pair.decode.finished.keys() | pair.prefill.finished.keys(), timeout_s=120)

        assert [pair.output(f"r{i}") for i in range(len(chosen))] == [p["completion_ids"][:NUM_TOKENS] for p in chosen]
        pair.run(lambda: not pair.blocks_in_use())
        _, of_decode = recorded
        assert len(of_decode.graphs) >= 2
        core = pair.decode.engine.core
        assert core._pool.num_blocks == pair.decode.engine.num_blocks == core._runner._region.num_blocks - 1
        assert not core._runner._region.kv[core._pool.num_blocks].any()  # the block of padding rows: zeros for ever
    finally:
        pair.close()
