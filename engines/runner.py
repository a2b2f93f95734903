"""Runs one step: from a plan to a packed batch, through the model, to sampled tokens. Owns no decision."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engines.attention.backend import AttentionBackend, AttentionMetadata, AttentionRow
from engines.attention.choose import choose_attention
from engines.attention.windowed import WindowedAttention
from engines.errors import ForwardFailed, NonFiniteLogits
from engines.graphs.capture import GraphMaker
from engines.graphs.make import make_decode_graphs
from engines.kv_region import KVTensor
from engines.models.generic import GenericModel
from engines.models.llama import LlamaModel
from engines.packed_batch import PackedBatch
from engines.prompt_scores import PromptScores
from engines.sampling.prompt_logprobs import score_tokens
from engines.sampling.sampler import Sampler
from engines.scheduler.plan import StepPlan
from engines.staging import Staging
from engines.step_rows import SampledTokens, StepRows
from engines.step_timer import OFF, OTHER, StepTimer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepResult:
    """`sampled` has an item for each scheduled sequence that samples, in the order of the plan."""

    step_id: int
    sampled: list[SampledTokens]


class ForwardPass:
    """A model and its attention over a KV region: what every rank of an engine does in a step. One thread.

    Args:
        kv: the whole region; a rank's model knows which heads in it are its own.
        graphs: makes graphs of decode steps; None computes all steps eagerly. Models with windows and those of
            transformers are computed eagerly anyway.
        scratch_block: with `graphs`, a block of the region that no sequence ever has.
    """

    def __init__(
        self,
        model: LlamaModel | GenericModel,
        kv: Tensor,
        *,
        device: str,
        graphs: GraphMaker | None = None,
        scratch_block: int = -1,
    ) -> None:
        self._model = model
        self._attention = _attention_of(model, kv)
        self._graphs = None if graphs is None else make_decode_graphs(model, kv, self._attention, graphs, scratch_block)
        self._staging = Staging(device)
        self._batch, self._rows = PackedBatch.of((), 1), tuple[AttentionRow, ...]()
        self._ids = self._positions = torch.empty(0)
        self._is_graph = False

    def begin(self, batch: PackedBatch, rows: tuple[AttentionRow, ...], *, is_pushed: bool = False) -> None:
        """Take in the step's tokens and where their KV lies.

        Args:
            is_pushed: `compute` will be given `on_layers`. Nothing can be told of the layers of a graph.
        """
        self._batch, self._rows = batch, rows
        self._is_graph = self._graphs is not None and not is_pushed and self._graphs.load(batch, rows)
        if not self._is_graph:
            self._begin_eager()

    def compute(self, on_layers: Callable[[int, int], None] | None = None, layer_group: int = 0) -> Tensor:
        """Hidden states `[num_tokens, hidden]` of the step that has begun; valid until the next step."""
        if self._graphs is not None and self._is_graph:
            return self._graphs.run(self._compare)
        return self._model.forward(
            self._ids, self._positions, self._attention, on_layers=on_layers, layer_group=layer_group
        )

    def _begin_eager(self) -> None:
        self._ids, self._positions, slots = self._staging.send(
            self._batch.ids, self._batch.positions, self._batch.slots
        )
        self._attention.begin_step(AttentionMetadata(self._rows, slots))

    def _compare(self) -> Tensor:
        self._begin_eager()
        return self._model.forward(self._ids, self._positions, self._attention)


class ModelRunner:
    """Owned by the engine thread. The only code that writes KV, apart from the transport's arrivals."""

    def __init__(
        self,
        model: LlamaModel | GenericModel,
        region: KVTensor,
        *,
        device: str,
        dtype: torch.dtype,
        timer: StepTimer = OFF,
        tell_ranks: Callable[[PackedBatch, tuple[AttentionRow, ...]], None] | None = None,
        graphs: GraphMaker | None = None,
        scratch_block: int = -1,
    ) -> None:
        """
        Args:
            tell_ranks: called with each step, for the other ranks of a tensor parallel engine to compute it, too.
            graphs, scratch_block: as `ForwardPass` takes them.
        """
        assert model.dtype == dtype == region.kv.dtype, (model.dtype, dtype, region.kv.dtype)
        self._model = model
        self._region = region
        self._pass = ForwardPass(model, region.kv, device=device, graphs=graphs, scratch_block=scratch_block)
        self._tell_ranks = tell_ranks
        self._kernels = model.kernels if isinstance(model, LlamaModel) else None
        self._sampler = Sampler(model.config.eos_token_ids, self._kernels)
        self._timer = timer

    @property
    def vocab_size(self) -> int:
        return self._model.config.vocab_size

    def run(
        self, plan: StepPlan, *, on_layers: Callable[[int, int], None] | None = None, layer_group: int = 0
    ) -> StepResult:
        """Compute the KV of all scheduled tokens, and a token for each sequence that reaches its last one. Blocks.

        Args:
            on_layers: called with (lo, hi) when the KV of layers [lo, hi) is in the region; 0 groups all layers.

        Raises:
            ForwardFailed: torch gave up. The KV of this step's tokens is not to be used.
            NonFiniteLogits: an output is NaN; no token of this step was sampled.
        """
        try:
            with torch.inference_mode():
                hidden = self._forward(plan, on_layers, layer_group)
                self._timer.split("forward")
                self._score_prompts(plan, hidden)
                sampled = self._sample(plan, hidden)
                self._timer.split("sample")
                return StepResult(plan.step_id, sampled)
        except (RuntimeError, IndexError) as error:  # IndexError: an id or a position beyond the model's tables
            logger.exception("step %d failed", plan.step_id)
            raise ForwardFailed(step_id=plan.step_id, num_tokens=plan.num_tokens, detail=str(error)) from error

    def copy_blocks(self, pairs: list[tuple[int, int]]) -> None:
        """Copy the KV of whole blocks, (source, destination) each."""
        with torch.inference_mode():
            self._region.copy_blocks(pairs)

    def zero_tail(self, block: int, from_offset: int) -> None:
        """Zero a block's tokens from `from_offset` on, so that no other sequence's KV leaves with it."""
        with torch.inference_mode():
            self._region.zero_tail(block, from_offset)

    def _forward(self, plan: StepPlan, on_layers: Callable[[int, int], None] | None, layer_group: int) -> Tensor:
        self._timer.split(OTHER)
        batch = PackedBatch.of(plan.scheduled, self._region.block_size)
        rows = tuple(AttentionRow(i.start, i.num_new_tokens, i.sequence.block_table) for i in plan.scheduled)
        if self._tell_ranks is not None:
            self._tell_ranks(batch, rows)
        self._pass.begin(batch, rows, is_pushed=on_layers is not None)
        self._timer.split("metadata")
        return self._pass.compute(on_layers, layer_group)

    def _score_prompts(self, plan: StepPlan, hidden: Tensor) -> None:
        """Logprobs of the prompt tokens that follow the positions of this step, where a request wants them."""
        lo = 0
        for item in plan.scheduled:
            sequence, rows = item.sequence, hidden[lo : lo + item.num_new_tokens]
            lo += item.num_new_tokens
            if not sequence.wants_prompt_scores:
                continue
            if item.start == 0:
                sequence.prompt_scores = PromptScores(sequence.params.prompt_logprobs or 0)
            assert sequence.prompt_scores is not None, f"{sequence.seq_id} begins at {item.start}"
            targets = sequence.prompt_token_ids[item.start + 1 : item.start + 1 + item.num_new_tokens]
            if not score_tokens(self._model.logits, rows, targets, sequence.prompt_scores):
                raise NonFiniteLogits(request_ids=[sequence.rid])

    def _sample(self, plan: StepPlan, hidden: Tensor) -> list[SampledTokens]:
        needs = StepRows.of(plan)
        if not needs.rows:
            return needs.result([], [])
        # Decode steps sample every row: nothing to pick then.
        ended = hidden if len(needs.hidden_rows) == len(hidden) else hidden[needs.hidden_rows]
        logits, peaks, rows_with_nan = self._model.logits_and_peaks(
            ended, with_maxima=self._sampler.wants_maxima(needs.rows)
        )
        self._timer.split("logits")
        broken = set(rows_with_nan)
        if broken - needs.drafted:
            raise NonFiniteLogits(request_ids=[needs.rids[i] for i in sorted(broken - needs.drafted)])
        if broken:
            # Behind guesses that may be wrong: whatever is sampled there does not count.
            logits[rows_with_nan] = 0.0
            peaks = [0 if i in broken else peak for i, peak in enumerate(peaks)]
        if len(needs.rows) != len(needs.hidden_rows):
            logits = logits[needs.logit_of]
            peaks = [peaks[i] for i in needs.logit_of]
        maxima = None if broken else self._model.maxima_of(logits)
        return needs.result(*self._sampler.sample(logits, needs.rows, peaks, maxima), broken)


def _attention_of(model: LlamaModel | GenericModel, kv: Tensor) -> AttentionBackend:
    if isinstance(model, GenericModel):
        return model.make_attention(kv)
    kv = kv[:, :, :, model.kv_heads]
    make = partial(choose_attention, kv, model.config.num_heads, model.kernels, deterministic=model.is_deterministic)
    windows = model.config.windows
    return WindowedAttention(make, kv, windows) if any(windows) else make()
