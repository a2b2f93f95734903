"""What a worker says of its KV when it meets another: what must be equal, and what may differ.

compat    weights, quantisation and tokenizer: a pair that differs cannot work, and is refused with the values of both
layout    layers, heads, head size must be equal, too; block size, dtype and head slice are converted
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from configs.schema import EngineSettings, Settings
from engines.models.shape import ModelShape
from kvstore.reshard import KVLayout

_DIGEST_CHARS = 32


def kv_layout(config: ModelShape, settings: Settings, dtype: str) -> KVLayout:
    """Of an engine that holds all heads.

    Args:
        dtype: of the KV region: float32 or bfloat16.
    """
    return KVLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_lo=0,
        head_hi=config.num_kv_heads,
        block_size=settings.kv.block_size,
        head_dim=config.head_dim,
        dtype=dtype,  # type: ignore[arg-type]  # what choose_dtype gives
        compression=settings.transfer.compression,
    )


def weights_form(engine: EngineSettings) -> str:
    """How the engine stores weights: KV made with one form is not what another would have made."""
    group = f"/{engine.quantization_group}" if engine.quantization == "int4" else ""
    return f"{engine.quantization}{group}"


def compat_of(folder: Path, weights: str, form: str) -> str:
    """Equal on two workers only if tokens of one mean the same to the other.

    Args:
        folder: of the model.
        weights: digest over its weights and config.
        form: `weights_form`.
    """
    path = folder / "tokenizer.json"
    tokenizer = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "none"
    # Short: both sides' texts stand in one message of the handshake.
    quantization = "" if form == "none" else f" quantization={form}"
    return f"weights={weights[:_DIGEST_CHARS]}{quantization} tokenizer={tokenizer[:_DIGEST_CHARS]}"
