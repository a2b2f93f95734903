"""Models that the engine is measured on: shapes, what a step must read and compute, checkpoints made on the spot.

Weights are random: speed does not depend on them, and nothing has to be fetched.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

BYTES_OF: Final = {"float32": 4, "bfloat16": 2}
MAX_POSITIONS: Final = 4096
_STD: Final = 0.02
_CHUNK_VALUES: Final = 1 << 22


@dataclass(frozen=True)
class Shape:
    """A Llama-type model with tied embeddings. `folder`: where it is, in the checkout; "" is made on the spot."""

    name: str
    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate: int
    vocab: int
    folder: str = ""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def layer_params(self) -> int:
        """Weights of the matrices of one layer."""
        return self.hidden * (2 * self.hidden + 2 * self.kv_size + 3 * self.intermediate)

    def step_bytes(self, *, num_seqs: int, num_context_tokens: int, dtype: str) -> float:
        """What one decode step must read: all matrices once (the tied head too), and the KV of all sequences."""
        params = self.num_layers * self.layer_params + self.hidden * self.vocab
        kv = 2 * self.num_layers * self.kv_size * num_context_tokens
        return float(BYTES_OF[dtype] * (params + kv + num_seqs * self.hidden))

    def flops(self, *, num_tokens: int, num_seqs: int, num_context_tokens: int) -> float:
        """Of one step: matrices for each token, the head for each sequence.

        Args:
            num_context_tokens: for each new token the tokens that it looks at, summed.
        """
        attention = 4 * self.hidden * self.num_layers * num_context_tokens
        return float(2 * (self.num_layers * self.layer_params * num_tokens + self.hidden * self.vocab * num_seqs)) + (
            attention
        )


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("tiny-chat", 256, 6, 8, 2, 704, 2560, folder="models/tiny-chat"),
        Shape("135m", 576, 30, 9, 3, 1536, 49152),
        Shape("05b", 896, 24, 14, 2, 4864, 151936),
    )
}


def write_checkpoint(
    shape: Shape,
    folder: Path,
    *,
    seed: int = 0,
    max_positions: int = MAX_POSITIONS,
    on_bytes: Callable[[int, int], None] = lambda *_: None,
) -> None:
    """Write config.json, model.safetensors (bfloat16) and a byte tokenizer. The same seed gives the same bytes.

    Args:
        max_positions: tokens of the longest sequence.
        on_bytes: told of the bytes written so far and of all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    folder.joinpath("config.json").write_text(json.dumps(_config(shape, max_positions), indent=1))
    folder.joinpath("tokenizer.json").write_text(json.dumps(_byte_tokenizer()))
    folder.joinpath("tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    tensors = dict(_tensors(shape))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        start, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    rng = np.random.default_rng(seed)
    with folder.joinpath("model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        written = 0
        for name, dims in tensors.items():
            for chunk in _values(name, math.prod(dims), rng):
                written += file.write(chunk)
                on_bytes(written, end)


def _values(name: str, num_values: int, rng: np.random.Generator) -> Iterator[bytes]:
    for start in range(0, num_values, _CHUNK_VALUES):
        num = min(_CHUNK_VALUES, num_values - start)
        values = np.ones(num, np.float32) if "norm" in name else rng.standard_normal(num, np.float32) * np.float32(_STD)
        yield (values.view(np.uint32) >> 16).astype("<u2").tobytes()  # bfloat16: the upper half, cut off


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, kv, inter = shape.hidden, shape.kv_size, shape.intermediate
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for k in range(shape.num_layers):
        layer = f"model.layers.{k}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{layer}.self_attn.k_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.v_proj.weight", (kv, hidden)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", (inter, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inter, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inter)
    yield "model.norm.weight", (hidden,)


def _config(shape: Shape, max_positions: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def _byte_tokenizer() -> dict[str, Any]:
    """Three special tokens and one token per byte: enough for programs that insist on a tokenizer."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + k) for k, byte in enumerate(others)}}
    special = ["<pad>", "<s>", "</s>"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": k, "content": token, **flags} for k, token in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {**{t: k for k, t in enumerate(special)}, **{letters[b]: 3 + b for b in range(256)}},
            "merges": [],
        },
    }
