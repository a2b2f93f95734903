"""Replayed decode steps equal computed ones: buffers, padding, buckets, and what happens when they do not."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.attention.backend import AttentionRow
from engines.factory import build_engine_model
from engines.graphs.buckets import MAX_PADDED_TOKENS, ROW_BUCKETS, bucket_of
from engines.graphs.capture import CudaGraphs, GraphMaker
from engines.graphs.decode_graphs import DecodeGraphs
from engines.graphs.decode_inputs import DecodeStep
from engines.graphs.make import choose_graphs
from engines.models.llama import LlamaModel
from engines.packed_batch import PackedBatch
from engines.runner import ForwardPass
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.devices import DEVICES
from tests.recorded_graphs import AsksTheHost, RecordedGraphs, RepeatedGraphs
from tests.unit.engines.gate_engine import gate_model, run_case
from tests.unit.engines.test_gate_axes import PLAIN, expected, gate_prompts

NUM_BLOCKS, BLOCK_SIZE, BLOCKS_EACH = 48, 4, 8
SCRATCH = NUM_BLOCKS
GATE_CASES = [
    {**PLAIN, "max_seqs": "16", "chunk": "33"},
    {**PLAIN, "max_seqs": "16", "cache": "warm", "role": "handed"},
    PLAIN,
]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    tmp = tmp_path_factory.mktemp("graphs")
    return {family: make_checkpoint(tmp, family, seed=3) for family in FAMILIES}


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LlamaModel:
    model, _ = build_engine_model(folder, dtype=dtype, device=device, linear="torch", kernels="torch")
    assert isinstance(model, LlamaModel)
    return model


class Rig:
    """A pass over a region of its own that is full of NaN where no token is."""

    def __init__(self, model: LlamaModel, graphs: GraphMaker | None, device: str = "cpu") -> None:
        config = model.config
        shape = (NUM_BLOCKS + 1, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.kv = torch.full(shape, float("nan"), dtype=model.dtype, device=device)
        self.forward = ForwardPass(model, self.kv, device=device, graphs=graphs, scratch_block=SCRATCH)

    def step(self, batch: PackedBatch, rows: tuple[AttentionRow, ...]) -> Tensor:
        self.forward.begin(batch, rows)
        return self.forward.compute().clone()

    @property
    def graphs(self) -> DecodeGraphs:
        assert self.forward._graphs is not None
        return self.forward._graphs

    @property
    def bits(self) -> Tensor:
        """Of the region without the scratch block; NaN equals NaN there."""
        return self.kv[:SCRATCH].contiguous().view(torch.uint8)


def random_steps(seed: int, num_steps: int) -> Iterator[tuple[PackedBatch, tuple[AttentionRow, ...]]]:
    """Sequences that grow, sit out steps, end and begin again in blocks that others had, whose rest is their KV."""
    rng = random.Random(seed)
    blocks = list(range(NUM_BLOCKS))
    rng.shuffle(blocks)
    sequences = [(0, [blocks.pop() for _ in range(BLOCKS_EACH)]) for _ in range(6)]
    for _ in range(num_steps):
        members = rng.sample(range(6), rng.randint(1, 6))
        for i in members:
            if rng.random() < 0.05 or sequences[i][0] == BLOCKS_EACH * BLOCK_SIZE:
                table = list(sequences[i][1])
                rng.shuffle(table)
                sequences[i] = (0, table)
        rows = tuple(AttentionRow(start, 1, table) for start, table in (sequences[i] for i in members))
        yield batch_of(rows, [rng.randrange(250) for _ in members]), rows
        for i in members:
            sequences[i] = (sequences[i][0] + 1, sequences[i][1])


def batch_of(rows: tuple[AttentionRow, ...], ids: list[int]) -> PackedBatch:
    positions = np.array([row.start for row in rows])
    slots = [row.block_table[row.start // BLOCK_SIZE] * BLOCK_SIZE + row.start % BLOCK_SIZE for row in rows]
    return PackedBatch(np.array(ids), positions, np.array(slots))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_replay_equals_the_computed_step_bit_for_bit(
    family: str, dtype: torch.dtype, folders: dict[str, Path]
) -> None:
    model = load(folders[family], dtype)
    if any(model.config.windows):
        pytest.skip("models with windows have no graphs")
    recorded, computed = Rig(model, RecordedGraphs()), Rig(model, RepeatedGraphs())

    with torch.inference_mode():
        for batch, rows in random_steps(FAMILIES.index(family), 15):
            assert torch.equal(recorded.step(batch, rows), computed.step(batch, rows))
            assert torch.equal(recorded.bits, computed.bits)

    assert recorded.graphs.is_on
    assert recorded.graphs.num_graphs >= 3
    assert not recorded.kv[SCRATCH].any()  # zeros, as at the start


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_graphs_agree_with_the_eager_pass(
    dtype: torch.dtype, tolerance: float, device: str, folders: dict[str, Path]
) -> None:
    model = load(folders["llama"], dtype, device)
    graphs: GraphMaker = RecordedGraphs() if device == "cpu" else CudaGraphs()
    replayed, eager = Rig(model, graphs, device), Rig(model, None, device)

    with torch.inference_mode():
        for batch, rows in random_steps(9, 15):
            found, wanted = replayed.step(batch, rows), eager.step(batch, rows)
            assert float((found - wanted).float().norm() / wanted.float().norm()) < tolerance

    assert replayed.graphs.is_on


def test_who_fills_the_other_rows_changes_no_bit_of_a_row(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    rows = tuple(AttentionRow(0, 1, [i]) for i in range(4))
    alone, together = Rig(model, RecordedGraphs()), Rig(model, RecordedGraphs())

    with torch.inference_mode():
        found = alone.step(batch_of(rows[:3], [5, 6, 7]), rows[:3])
        beside = together.step(batch_of(rows, [5, 6, 7, 8]), rows)

    assert torch.equal(found, beside[:3])


@pytest.mark.parametrize("case", GATE_CASES, ids=lambda case: "-".join(case.values()))
def test_the_gate_holds_with_graphs(case: dict[str, str], folders: dict[str, Path]) -> None:
    folder = folders["qwen3"]
    want = expected(folder)
    graphs = RecordedGraphs()

    outputs = run_case(gate_model(folder, "torch", "torch", torch.float32), gate_prompts(), case, graphs=graphs)

    assert graphs.graphs
    assert [output.token_ids for output in outputs] == want.token_ids
    assert max(float((o.logits - w).abs().max()) for o, w in zip(outputs, want.logits, strict=True)) < 1e-3


class _Baked:
    """Gives what was computed at the recording, whatever the step is."""

    def capture(self, work: Callable[[], Tensor]) -> _Baked:
        self.result = work().clone()
        return self

    def replay(self) -> Tensor:
        return self.result


class _Failing:
    def capture(self, _work: Callable[[], Tensor]) -> _Baked:
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.mark.parametrize(
    ("graphs", "says"), [(_Baked(), "is off by"), (_Failing(), "cannot be recorded")], ids=["wrong", "impossible"]
)
def test_graphs_that_do_not_work_turn_themselves_off_and_the_step_is_right(
    graphs: GraphMaker, says: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders["llama"])
    rig, eager = Rig(model, graphs), Rig(model, None)

    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        for batch, rows in random_steps(1, 5):
            assert torch.equal(rig.step(batch, rows), eager.step(batch, rows))

    assert torch.equal(rig.bits, eager.bits)
    assert not rig.graphs.is_on
    assert [record.message for record in caplog.records if says in record.message] == [caplog.records[0].message]
    assert len(caplog.records) == 1


class _LeavesNoKV:
    """Right hidden states; but what it writes is gone."""

    kv: Tensor

    def capture(self, work: Callable[[], Tensor]) -> _LeavesNoKV:
        self._work = work
        return self

    def replay(self) -> Tensor:
        before = self.kv.clone()
        hidden = self._work().clone()
        self.kv.copy_(before)
        return hidden


def test_a_graph_whose_kv_is_not_where_it_belongs_is_found(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model, graphs = load(folders["llama"]), _LeavesNoKV()
    rig, eager = Rig(model, graphs), Rig(model, None)
    graphs.kv = rig.kv
    rig.kv[:SCRATCH], eager.kv[:SCRATCH] = 0.25, 0.25  # what a former sequence left: no NaN shows it

    with torch.inference_mode():
        for batch, rows in random_steps(3, 5):
            assert torch.equal(rig.step(batch, rows), eager.step(batch, rows))

    assert torch.equal(rig.bits, eager.bits)
    assert "is off by" in caplog.text


def test_damaged_kv_says_nothing_about_a_graph(folders: dict[str, Path]) -> None:
    rig = Rig(load(folders["llama"]), RecordedGraphs())
    rows = (AttentionRow(3, 1, [2]),)  # three tokens that nobody has written
    with torch.inference_mode():
        assert rig.step(batch_of(rows, [5]), rows).isnan().all()
        assert rig.graphs.is_on
        fresh = (AttentionRow(0, 1, [7]),)
        assert rig.step(batch_of(fresh, [5]), fresh).isfinite().all()
    assert rig.graphs.is_on


def test_no_more_graphs_are_recorded_than_allowed(folders: dict[str, Path]) -> None:
    model = load(folders["llama"])
    rig, graphs = Rig(model, RecordedGraphs()), RecordedGraphs()
    rig.forward._graphs = rig.graphs.__class__(
        rig.kv,
        scratch_block=SCRATCH,
        forward=model.forward,
        make_attention=rig.graphs._make_attention,
        maker=graphs,
        max_graphs=2,
    )
    eager = Rig(model, None)
    with torch.inference_mode():
        for batch, rows in random_steps(2, 15):
            torch.testing.assert_close(rig.step(batch, rows), eager.step(batch, rows), rtol=1e-3, atol=1e-4)

    assert len(graphs.graphs) == rig.graphs.num_graphs == 2


def test_chunks_and_pushed_steps_are_computed_eagerly(folders: dict[str, Path]) -> None:
    rig = Rig(load(folders["llama"]), RecordedGraphs())
    chunk, one = (AttentionRow(0, 3, [4]),), (AttentionRow(3, 1, [4]),)
    reported: list[tuple[int, int]] = []
    with torch.inference_mode():
        rig.forward.begin(PackedBatch(np.array([5, 6, 7]), np.arange(3), np.arange(16, 19)), chunk)
        rig.forward.compute()
        rig.forward.begin(batch_of(one, [8]), one, is_pushed=True)
        rig.forward.compute(lambda lo, hi: reported.append((lo, hi)))

    assert rig.graphs.num_graphs == 0
    assert reported


def test_a_recording_that_asks_the_host_fails_by_name() -> None:
    numbers = torch.arange(5)
    with pytest.raises(AsksTheHost):
        RecordedGraphs().capture(lambda: numbers[: int(numbers.max())])
    with pytest.raises(AsksTheHost):
        RecordedGraphs().capture(lambda: numbers[numbers > 2])


@pytest.mark.parametrize("seed", range(20))
def test_padded_tables_hold_the_pages_of_each_row_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    rows = [
        AttentionRow(rng.randrange(8 * BLOCK_SIZE), 1, [rng.randrange(NUM_BLOCKS) for _ in range(9)])
        for _ in range(rng.randint(0, 8))
    ]
    step = DecodeStep.padded(rows, num_rows=8, num_pages=8, block_size=BLOCK_SIZE, scratch_block=SCRATCH)

    for i in range(8):
        pages = rows[i].block_table[: -(-rows[i].context_len // BLOCK_SIZE)] if i < len(rows) else []
        assert step.tables[i].tolist() == pages + [SCRATCH] * (8 - len(pages))
        assert step.contexts[i] == (rows[i].context_len if i < len(rows) else 1)


def test_buckets_hold_their_steps_and_bound_what_a_step_gathers() -> None:
    for num_rows in range(1, 300):
        for num_pages in (1, 3, 17, 600, 5000):
            bucket = bucket_of(num_rows, num_pages, 32)
            if bucket is None:
                assert num_rows > ROW_BUCKETS[-1] or num_rows * num_pages * 32 * 4 > MAX_PADDED_TOKENS
                continue
            assert bucket[0] >= num_rows
            assert bucket[1] >= num_pages
            assert bucket[0] * bucket[1] * 32 <= MAX_PADDED_TOKENS


def test_graphs_are_for_gpus_unless_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    assert isinstance(choose_graphs("auto", "cuda"), CudaGraphs)
    assert choose_graphs("off", "cuda") is None
    assert choose_graphs("auto", "cpu") is None


def test_a_model_with_windows_has_no_graphs_and_says_so(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load(folders["llama"])
    model.config = replace(model.config, windows=(4,) * model.config.num_layers)
    with caplog.at_level(logging.INFO):
        rig = Rig(model, RecordedGraphs())
    assert rig.forward._graphs is None
    assert "decode graphs are off" in caplog.text
