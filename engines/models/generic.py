"""Any decoder that transformers knows, over the same paged KV and behind the same interface as the lean models.

transformers calls an attention function by name; ours writes the keys and values of the step into the region and reads
the context from there, so nothing of a sequence lives in the model and hand-off, chunks and prefix cache just work:

    packed ids [1, num_tokens] -> transformers' model -> paged_attention(layer) -> region
                                  (one batch row: which tokens belong together only the attention knows)

Slower than the lean models: no fused products, eager attention, the Python of transformers in each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from engines.attention.backend import AttentionBackend
from engines.attention.generic_attention import GenericAttention, Variant
from engines.models.shape import ModelShape
from engines.sampling.peaks import GroupMaxima, find_peaks

ATTENTION_NAME: Final = "celeriac_paged"
# Arguments of attention functions that change nothing here: `position_ids` is what the rotation has used already.
HARMLESS: Final = frozenset(
    {"dropout", "position_ids", "use_cache", "output_router_logits", "is_causal", "cache_position"}
)
KNOWN: Final = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})


class UnknownAttention(RuntimeError):
    """A layer asks for something of its attention that we do not know, or is not the layer that should come next."""


@dataclass(slots=True)
class _Step:
    """One forward pass: where the attention of its layers goes."""

    attention: GenericAttention
    num_layers: int
    on_layers: Callable[[int, int], None] | None = None
    layer_group: int = 0
    reported: int = 0
    num_called: int = 0


@dataclass(slots=True)
class LayerShapes:
    """What each layer's attention was called with, for a model that is met for the first time."""

    shapes: list[tuple[int, int, int]] = field(default_factory=list)  # KV heads, key size, value size
    windows: list[int | None] = field(default_factory=list)


_step: ContextVar[_Step | LayerShapes] = ContextVar("step")


def paged_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The function that transformers calls: `[1, num_heads, num_tokens, head_dim]` each; the result has tokens first.

    Raises:
        UnknownAttention: an argument that we do not know, or a layer out of order.
    """
    step, layer = _step.get(), getattr(module, "layer_idx", None)
    unknown = sorted(name for name in kwargs.keys() - HARMLESS - KNOWN if kwargs[name] is not None)
    if unknown or attention_mask is not None:
        raise UnknownAttention(f"layer {layer} calls attention with {', '.join(unknown) or 'a mask of its own'}")
    if isinstance(step, LayerShapes):
        if layer != len(step.shapes):
            raise UnknownAttention(f"attention is called for layer {layer} where {len(step.shapes)} comes next")
        step.shapes.append((key.shape[1], key.shape[3], value.shape[3]))
        step.windows.append(kwargs.get("sliding_window"))
        heads = query.shape[1] // key.shape[1]
        return value.repeat_interleave(heads, dim=1).transpose(1, 2).contiguous(), None
    if layer != step.num_called:
        raise UnknownAttention(f"attention is called for layer {layer} where {step.num_called} comes next")
    step.num_called += 1
    scale = kwargs.get("scaling")
    variant = Variant(
        scale=float(query.shape[3] ** -0.5) if scale is None else float(scale),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    step.attention.write_kv(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    out = step.attention.attend(layer, query[0].transpose(0, 1), key.shape[1], value.shape[3], variant)
    if step.on_layers is not None and (
        layer + 1 == step.num_layers or layer + 1 - step.reported >= (step.layer_group or step.num_layers)
    ):
        step.on_layers(step.reported, layer + 1)
        step.reported = layer + 1
    return out[None], None


class GenericModel:
    """A model of transformers that `engines.models.generic_loader` has tried out. Used by one thread at a time."""

    def __init__(self, model: Any, config: ModelShape) -> None:
        self.config = config
        self._model = model
        self._trunk = trunk_of(model)
        self._trunk_forward = self._trunk.forward

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self._model.device
        return device

    @property
    def transformers_model(self) -> Any:
        """The model itself, for comparisons."""
        return self._model

    def make_attention(self, kv: Tensor) -> GenericAttention:
        """The attention that this model runs on."""
        return GenericAttention(kv)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        attention: AttentionBackend,
        *,
        on_layers: Callable[[int, int], None] | None = None,
        layer_group: int = 0,
    ) -> Tensor:
        """As `LlamaModel.forward`, but the hidden states are those behind the last norm."""
        assert isinstance(attention, GenericAttention), attention
        step = _Step(attention, self.config.num_layers, on_layers, layer_group)
        token = _step.set(step)
        try:
            out = self._trunk_forward(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        finally:
            _step.reset(token)
        if step.num_called != self.config.num_layers:
            raise UnknownAttention(f"{step.num_called} of {self.config.num_layers} layers called attention")
        hidden: Tensor = out[0][0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[num_rows, vocab]`: what the model does behind its trunk (head, soft caps, scales)."""
        self._trunk.forward = _giving(hidden[None])
        try:
            out = self._model(
                input_ids=torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device), use_cache=False
            )
        finally:
            self._trunk.forward = self._trunk_forward
        logits: Tensor = out.logits[0].float()
        return logits

    def logits_and_peaks(self, hidden: Tensor, **_: bool) -> tuple[Tensor, list[int], list[int]]:
        """`logits`, and what `find_peaks` finds in them."""
        logits = self.logits(hidden)
        return logits, *find_peaks(logits, None)

    def maxima_of(self, _: Tensor) -> GroupMaxima | None:
        """None: the head of such a model keeps none."""
        return None


def layer_shapes(model: Any) -> LayerShapes:
    """What the model's layers ask of their attention, found out with one token.

    Raises:
        UnknownAttention: it calls attention in a way that we cannot follow.
    """
    found = LayerShapes()
    token = _step.set(found)
    try:
        zero = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        trunk_of(model)(input_ids=zero, position_ids=zero, use_cache=False)
    finally:
        _step.reset(token)
    return found


def trunk_of(model: Any) -> Any:
    """The part of a model that turns ids into hidden states; behind it is only the head.

    Raises:
        UnknownAttention: it has no such part.
    """
    trunk = model.get_decoder()
    if trunk is None or trunk is model:
        raise UnknownAttention("it has no decoder apart from its head")
    return trunk


class _TrunkOutput:
    """What a trunk returns, for the head: the hidden states, and None for whatever else a family's output has."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, key: int | slice) -> Any:
        return (self.last_hidden_state,)[key]

    def __getattr__(self, name: str) -> None:
        return None


def _giving(hidden: Tensor) -> Callable[..., _TrunkOutput]:
    return lambda *_args, **_kwargs: _TrunkOutput(hidden)
