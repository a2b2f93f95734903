"""What config.json of a Llama-type model says, checked. No torch, no weights, no code of the model's folder.

family    architectures[0]       q/k/v bias         o bias             q/k norm   mlp bias
llama     LlamaForCausalLM       attention_bias     attention_bias     no         mlp_bias
mistral   MistralForCausalLM     no                 no                 no         no
qwen2     Qwen2ForCausalLM       yes                no                 no         no
qwen3     Qwen3ForCausalLM       attention_bias     attention_bias     yes        no
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engines.errors import BadModelConfig, UnsupportedModel

FAMILIES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
ROPE_KINDS: Final = ("default", "linear", "dynamic", "llama3", "yarn")
_MOE_FIELDS: Final = ("num_experts", "num_local_experts", "n_routed_experts")
_DEFAULT_ROPE_THETA: Final = 10_000.0  # transformers' default for all four families
_MAX_LAYERS: Final = 10_000  # several times the deepest model there is
_DEFAULT_MAX_WINDOW_LAYERS: Final = 28  # the same, for Qwen


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. `default` needs `theta` only; the fields behind it are read by the kinds that scale.

    `dynamic` changes the angles beyond `max_position_embeddings` alone, and no context is longer: it is `default` here.
    """

    kind: str
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and switches of one model. Every field is checked: a ModelConfig can be built.

    `windows`: per layer, how many of the last tokens a query sees, itself included; None is all.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    windows: tuple[int | None, ...]

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read config.json and, for the end tokens, generation_config.json.

        Raises:
            BadModelConfig: a field is missing or breaks a rule.
            UnsupportedModel: another architecture, custom code, quantised weights, another rope or attention.
        """
        fields = _Fields(folder / "config.json")
        _refuse_foreign_code(fields)
        family = _family(fields)
        _refuse_quantised(fields)
        _refuse_partial_rotation(fields)
        if fields.get("hidden_act", "silu") != "silu":
            raise fields.unsupported(f"activation {fields.get('hidden_act')!r}", "Supported: silu.")
        hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        num_kv_heads = fields.count("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise fields.bad("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
        max_positions = fields.count("max_position_embeddings")
        vocab_size, num_layers = fields.count("vocab_size"), fields.count("num_hidden_layers")
        if num_layers > _MAX_LAYERS:
            raise fields.bad("num_hidden_layers", f"at most {_MAX_LAYERS}")
        attention_bias = fields.flag("attention_bias")
        return cls(
            family=family,
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=_head_dim(fields, hidden_size, num_heads),
            rms_norm_eps=fields.positive("rms_norm_eps", default=1e-6),
            max_position_embeddings=max_positions,
            rope=_rope(fields),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and attention_bias),
            o_bias=family in ("llama", "qwen3") and attention_bias,
            qk_norm=family == "qwen3",
            mlp_bias=family == "llama" and fields.flag("mlp_bias"),
            eos_token_ids=_eos_token_ids(folder, fields, vocab_size),
            windows=_windows(fields, family, num_layers),
        )


class _Fields:
    """One JSON object of a folder, read field by field; faults name the file and the field."""

    def __init__(self, path: Path, raw: dict[str, Any] | None = None) -> None:
        self.path = path
        self._raw = _read_object(path) if raw is None else raw

    def get(self, name: str, default: Any = None) -> Any:
        value = self._raw.get(name)
        return default if value is None else value

    def bad(self, name: str, rule: str) -> BadModelConfig:
        return BadModelConfig(self.path, field=name, found=self._raw.get(name), rule=rule)

    def unsupported(self, what: str, supported: str) -> UnsupportedModel:
        return UnsupportedModel(self.path, f"{what} is not supported", supported)

    def count(self, name: str, *, default: int | None = None) -> int:
        value = self.get(name, default)
        if type(value) is not int or value <= 0:
            raise self.bad(name, "a whole number > 0")
        return value

    def positive(self, name: str, *, default: float | None = None) -> float:
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise self.bad(name, "a number > 0")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.get(name, False)
        if type(value) is not bool:
            raise self.bad(name, "true or false")
        return value


def _read_object(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise BadModelConfig(path, field="(file)", found=str(error), rule="a readable file") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise BadModelConfig(path, field="(file)", found=str(error), rule="JSON in UTF-8") from error
    if not isinstance(raw, dict):
        raise BadModelConfig(path, field="(file)", found=type(raw).__name__, rule="a JSON object")
    return raw


def refuse_unservable(folder: Path) -> None:
    """What no runner serves, whatever the architecture.

    Raises:
        UnsupportedModel: code in the folder, or quantised weights.
        BadModelConfig: config.json is unreadable.
    """
    fields = _Fields(folder / "config.json")
    _refuse_foreign_code(fields)
    _refuse_quantised(fields)


def eos_token_ids_of(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """The end tokens of a model folder.

    Raises:
        BadModelConfig: they are no ids of the vocabulary.
    """
    return _eos_token_ids(folder, _Fields(folder / "config.json"), vocab_size)


def _refuse_foreign_code(fields: _Fields) -> None:
    if auto_map := fields.get("auto_map"):
        files = sorted({str(target).split("--")[-1].split(".")[0] + ".py" for target in _flat_values(auto_map)})
        raise UnsupportedModel(
            fields.path,
            f"`auto_map` asks to run the folder's own code ({', '.join(files)})",
            f"Code of a model folder is never run. Supported: {', '.join(FAMILIES)}.",
        )


def _family(fields: _Fields) -> str:
    supported = f"Supported: {', '.join(FAMILIES)}."
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        raise fields.bad("architectures", f"a list with one of {', '.join(FAMILIES)}")
    family = FAMILIES.get(str(architectures[0]))
    if family is None:
        raise fields.unsupported(f"architecture {architectures[0]!r}", supported)
    for name in _MOE_FIELDS:
        if fields.get(name):
            raise fields.unsupported(f"a mixture of experts (`{name}` = {fields.get(name)!r})", supported)
    return family


def _flat_values(auto_map: Any) -> list[str]:
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    return [str(v) for value in values for v in (value if isinstance(value, list) else [value]) if v]


def _refuse_quantised(fields: _Fields) -> None:
    for name in ("quantization_config", "compression_config"):
        if quantisation := fields.get(name):
            kind = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
            raise fields.unsupported(
                f"a checkpoint quantised with {kind!r} (`{name}`)",
                "Use the repository with bfloat16 or float32 weights.",
            )


def _refuse_partial_rotation(fields: _Fields) -> None:
    if fields.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.unsupported(
            "a rotary embedding of a part of each head (`partial_rotary_factor`)", "Supported: 1.0."
        )


def _windows(fields: _Fields, family: str, num_layers: int) -> tuple[int | None, ...]:
    """Window of each layer. One that is switched off, or as wide as the context, changes nothing: None."""
    layer_types = fields.get("layer_types", [])
    if not isinstance(layer_types, list):
        raise fields.bad("layer_types", "a list")
    is_used = fields.flag("use_sliding_window") if family.startswith("qwen") else family == "mistral"
    window = None
    if is_used and fields.get("sliding_window") is not None:
        window = fields.count("sliding_window")
    known = {"full_attention", "sliding_attention"} if window is not None else {"full_attention"}
    if other := sorted({str(kind) for kind in layer_types} - known):
        raise fields.unsupported(f"layer type {', '.join(other)} (`layer_types`)", f"Supported: {sorted(known)}.")
    if window is None or window >= fields.count("max_position_embeddings"):
        return (None,) * num_layers
    if family == "mistral":
        return (window,) * num_layers
    if layer_types:
        if len(layer_types) != num_layers:
            raise fields.bad("layer_types", f"a list of num_hidden_layers ({num_layers}) items")
        return tuple(window if kind == "sliding_attention" else None for kind in layer_types)
    first = fields.get("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS)
    if type(first) is not int or first < 0:
        raise fields.bad("max_window_layers", "a whole number")
    return tuple(window if layer >= first else None for layer in range(num_layers))


def _head_dim(fields: _Fields, hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is None and hidden_size % num_heads:
        raise fields.bad("num_attention_heads", f"a divisor of hidden_size ({hidden_size}), or an explicit head_dim")
    head_dim = fields.count("head_dim", default=hidden_size // num_heads)
    if head_dim % 2:
        raise fields.bad("head_dim", "an even number (rotary embedding turns pairs)")
    return head_dim


def _rope(fields: _Fields) -> RopeConfig:
    """`rope_parameters` (transformers 5) before `rope_theta` and `rope_scaling` (older)."""
    name = "rope_parameters" if fields.get("rope_parameters") is not None else "rope_scaling"
    raw = fields.get(name, {})
    if not isinstance(raw, dict):
        raise fields.bad(name, "an object")
    if any(isinstance(value, dict) for value in raw.values()):
        raise fields.unsupported(f"a rope per layer type (`{name}`)", "Supported: one rope for all layers.")
    rope = _Fields(fields.path, raw)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise fields.unsupported(f"rope type {kind!r} (`{name}`)", f"Supported: {', '.join(ROPE_KINDS)}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise fields.unsupported(f"a rotary embedding of a part of each head (`{name}`)", "Supported: 1.0.")
    theta = rope.positive("rope_theta", default=fields.positive("rope_theta", default=_DEFAULT_ROPE_THETA))
    if kind == "default":
        return RopeConfig(kind, theta)
    factor = rope.positive("factor")
    if kind == "dynamic":
        return RopeConfig("default", theta)
    if kind == "linear":
        return RopeConfig(kind, theta, factor)
    if kind == "yarn":
        return _yarn(fields, rope, theta, factor)
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if high <= low:
        raise rope.bad("high_freq_factor", f"a number > low_freq_factor ({low})")
    return RopeConfig(kind, theta, factor, low, high, rope.count("original_max_position_embeddings"))


def _yarn(fields: _Fields, rope: _Fields, theta: float, factor: float) -> RopeConfig:
    """YaRN (Peng et al., 2023), with the defaults of transformers."""
    if theta <= 1:
        raise rope.bad("rope_theta", "a number > 1 for yarn")
    outer = fields.get("original_max_position_embeddings")
    length = rope.count("original_max_position_embeddings", default=fields.count("max_position_embeddings"))
    attention = _magnitude(factor)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        attention = _magnitude(factor, rope.positive("mscale")) / _magnitude(factor, rope.positive("mscale_all_dim"))
    return RopeConfig(
        "yarn",
        theta,
        factor,
        original_max_position_embeddings=fields.count("original_max_position_embeddings") if outer else length,
        attention_factor=rope.positive("attention_factor", default=attention),
        beta_fast=rope.positive("beta_fast", default=32.0),
        beta_slow=rope.positive("beta_slow", default=1.0),
        truncate=rope.get("truncate", True) is not False,
    )


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _eos_token_ids(folder: Path, fields: _Fields, vocab_size: int) -> tuple[int, ...]:
    """All of generation_config.json's, else config.json's. None is allowed: then only lengths and stops end a text."""
    source = fields
    generation = folder / "generation_config.json"
    if generation.exists():
        candidate = _Fields(generation)
        if candidate.get("eos_token_id") is not None:
            source = candidate
    eos = source.get("eos_token_id", [])
    ids = eos if isinstance(eos, list) else [eos]
    if any(type(token_id) is not int or not 0 <= token_id < vocab_size for token_id in ids):
        raise source.bad("eos_token_id", f"ids in 0..{vocab_size - 1}")
    return tuple(dict.fromkeys(ids))
