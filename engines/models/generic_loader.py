"""Load a decoder through transformers, and prove before serving it that it computes the same over paged KV.

The proof is a trial: two sequences in one packed batch, in chunks, against transformers' own eager attention. What
cannot run like this (state beside keys and values, positions in a mask, attention to later tokens) is refused by name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from engines.attention.backend import AttentionMetadata, AttentionRow
from engines.errors import BadModelConfig, BadWeights, UnsupportedModel
from engines.models.checkpoint import short_list
from engines.models.config import eos_token_ids_of, refuse_unservable
from engines.models.context import context_length
from engines.models.generic import ATTENTION_NAME, GenericModel, UnknownAttention, layer_shapes, paged_attention

logger = logging.getLogger(__name__)

_TRIAL_BLOCK: Final = 4
_MAX_ERROR: Final = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of the logits, relative, as one norm


@dataclass(frozen=True, slots=True)
class GenericConfig:
    """A `ModelShape`. `num_kv_heads` and `head_dim` are the largest of any layer."""

    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


def load_generic(folder: Path, *, dtype: torch.dtype, device: str = "cpu") -> tuple[GenericModel, GenericConfig]:
    """Blocks until the weights are in the memory of `device` and the trial, on that device, is over.

    Raises:
        UnsupportedModel: not a decoder, or one that cannot run over paged KV.
        BadModelConfig, BadWeights: the folder is damaged.
    """
    path = folder / "config.json"
    refuse_unservable(folder)
    model = _load(folder, path, dtype).to(device)
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(path, f"{_name(model)} is an encoder-decoder", "Supported: decoders.")
    if getattr(model, "_is_stateful", False):
        raise UnsupportedModel(
            path, f"{_name(model)} keeps a state beside keys and values (Mamba and its like)", "Supported: attention."
        )
    try:
        layers = layer_shapes(model)
        config = _config(folder, model, layers.shapes)
        _check_windows(model, layers.windows)
        generic = GenericModel(model, config)
        error = _trial_error(generic)
    except BadModelConfig:
        raise
    except Exception as why:
        # Models are other people's code: whatever it raises when called like this means that it cannot be.
        raise UnsupportedModel(path, f"{_name(model)} does not run over paged KV ({why})", _WAY_OUT) from why
    if not error < _MAX_ERROR[dtype]:  # NaN is no success either
        raise UnsupportedModel(
            path, f"{_name(model)} computes something else over paged KV (logits differ by {error:.2g})", _WAY_OUT
        )
    logger.info(
        "%s: %s runs by transformers, slower than a model of our own (trial: %.1e)", folder, _name(model), error
    )
    return generic, config


_WAY_OUT: Final = "Supported: decoders that keep nothing but keys and values and use transformers' attention functions."


def _load(folder: Path, path: Path, dtype: torch.dtype) -> Any:
    import transformers

    if not any(folder.glob("*.safetensors")):
        raise BadWeights(folder, "there is no *.safetensors file", "Pickled weights are never read; convert them.")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers.AttentionInterface.register(ATTENTION_NAME, paged_attention)
    try:
        loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (KeyError, ValueError, ImportError, TypeError, AttributeError) as error:
        message = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        if isinstance(error, KeyError) and error.args[:1] == (ATTENTION_NAME,):
            message = "its attention cannot be exchanged for another function"
        raise UnsupportedModel(path, f"transformers cannot make a decoder of it ({message})", _WAY_OUT) from error
    except (OSError, RuntimeError) as error:
        raise BadWeights(folder, f"transformers cannot load it ({str(error)[:500]})", "Use intact files.") from error
    except Exception as error:  # safetensors' error is a bare Exception
        raise BadWeights(folder, f"the weights cannot be read ({str(error)[:300]})", "Use intact files.") from error
    model, told = loaded
    if missing := sorted(told["missing_keys"]):
        raise BadWeights(
            folder, f"tensors are missing ({short_list(missing)})", "Expected all that config.json asks for."
        )
    model.eval()
    return model


def _config(folder: Path, model: Any, shapes: list[tuple[int, int, int]]) -> GenericConfig:
    config = model.config.get_text_config(decoder=True)
    if len(shapes) != config.num_hidden_layers:
        raise UnknownAttention(f"{len(shapes)} of {config.num_hidden_layers} layers have attention")
    vocab_size = int(config.vocab_size)
    return GenericConfig(
        vocab_size=vocab_size,
        num_layers=len(shapes),
        num_heads=int(config.num_attention_heads),
        num_kv_heads=max(heads for heads, _, _ in shapes),
        head_dim=max(max(key, value) for _, key, value in shapes),
        max_position_embeddings=context_length(folder),
        eos_token_ids=eos_token_ids_of(folder, vocab_size),
    )


def _check_windows(model: Any, windows: list[int | None]) -> None:
    """The trial is shorter than most windows, so they do not show in it: the layers must ask for what config says."""
    config = model.config.get_text_config(decoder=True)
    asked = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if asked else "full_attention"] * len(windows)
    if other := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise UnknownAttention(f"layers of the kind {', '.join(other)}")
    expected = [asked if kind == "sliding_attention" else None for kind in kinds]
    if expected != windows:
        raise UnknownAttention(f"windows are {expected} by its config and {windows} by its layers")


# ---------------------------------------------------------------- trial
def _trial_error(generic: GenericModel) -> float:
    """Relative error of our logits against those of transformers' eager attention, over two sequences."""
    config = generic.config
    length = min(22, config.max_position_embeddings - 1)
    lengths = (length, length // 2)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, config.vocab_size, (n,), generator=generator).to(generic.device) for n in lengths]
    with torch.inference_mode():
        expected = [_eager_logits(generic, ids) for ids in prompts]
        found = _packed_logits(generic, prompts)
    wrong = sum(float((a - b).norm()) for a, b in zip(found, expected, strict=True))
    return wrong / sum(float(b.norm()) for b in expected)


def _eager_logits(generic: GenericModel, ids: Tensor) -> Tensor:
    model = generic.transformers_model
    model.set_attn_implementation("eager")
    try:
        logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
        return logits
    finally:
        model.set_attn_implementation(ATTENTION_NAME)


def _packed_logits(generic: GenericModel, prompts: list[Tensor]) -> list[Tensor]:
    """Both in each step, cut at a third of their length, over blocks in no order and full of NaN."""
    config, device = generic.config, generic.device
    num_pages = -(-max(map(len, prompts)) // _TRIAL_BLOCK)
    shape = (2 * num_pages, config.num_layers, 2, config.num_kv_heads, _TRIAL_BLOCK, config.head_dim)
    attention = generic.make_attention(torch.full(shape, float("nan"), dtype=generic.dtype, device=device))
    tables = [list(range(i, 2 * num_pages, 2))[::-1] for i in range(2)]
    parts: list[list[Tensor]] = [[], []]
    for spans in zip(*(((0, len(ids) // 3), (len(ids) // 3, len(ids))) for ids in prompts), strict=True):
        rows = tuple(AttentionRow(lo, hi - lo, table) for (lo, hi), table in zip(spans, tables, strict=True))
        slots = [
            table[p // _TRIAL_BLOCK] * _TRIAL_BLOCK + p % _TRIAL_BLOCK
            for (lo, hi), table in zip(spans, tables, strict=True)
            for p in range(lo, hi)
        ]
        attention.begin_step(AttentionMetadata(rows, torch.tensor(slots, device=device)))
        ids = torch.cat([prompt[lo:hi] for prompt, (lo, hi) in zip(prompts, spans, strict=True)])
        positions = torch.cat([torch.arange(lo, hi, device=device) for lo, hi in spans])
        logits = generic.logits(generic.forward(ids, positions, attention))
        for part, rows_of in zip(parts, torch.split(logits, [hi - lo for lo, hi in spans]), strict=True):
            part.append(rows_of)
    return [torch.cat(part) for part in parts]


def _name(model: Any) -> str:
    return type(model).__name__
