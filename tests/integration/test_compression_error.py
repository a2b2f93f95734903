"""How much compression on the wire changes: KV, and the logits that come of it, on every prompt of the gate.

pytest -s tests/integration/test_compression_error.py        prints the figures that docs/transfer.md states
"""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from kvstore.reshard import Conversion, KVLayout
from kvstore.reshard.pack import Packer
from tests.cluster import TINY_CHAT

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY_CHAT, dtype=torch.float32).eval()


def _sent(kv: torch.Tensor, kind: Literal["fp8", "int8"]) -> torch.Tensor:
    """`[layers, 2, heads, tokens, head_dim]` as it lies in the receiver's pages."""
    layers, _, heads, tokens, dim = kv.shape
    layout = KVLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_lo=0,
        head_hi=heads,
        block_size=tokens,
        head_dim=dim,
        dtype="float32",
        compression=kind,
    )
    conversion = Conversion.between(layout, layout, is_network=True)
    packer = Packer(conversion, memoryview(kv.contiguous().numpy()).cast("B"))
    wire = np.empty(layers * conversion.wire_layer_bytes, dtype=np.uint8)
    return torch.from_numpy(packer.pack(wire, {0: 0}, 0, tokens, 0, layers).view(np.float32)).view(kv.shape)


@torch.no_grad()
def _next_logits(model: Any, kv: torch.Tensor, token_id: int) -> torch.Tensor:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(kv):
        cache.update(keys[None], values[None], layer)
    logits: torch.Tensor = model(torch.tensor([[token_id]]), past_key_values=cache).logits[0, -1]
    return logits


@pytest.mark.parametrize(
    ("kind", "kv_rms", "kv_max", "logit_rms"), [("int8", 0.008, 0.0045, 0.0075), ("fp8", 0.028, 0.045, 0.03)]
)
def test_the_error_is_what_the_docs_say(
    model: Any, kind: Literal["fp8", "int8"], kv_rms: float, kv_max: float, logit_rms: float
) -> None:
    squares, errors, largest, logit_errors, same = 0.0, 0.0, 0.0, [], 0
    for prompt in PROMPTS:
        ids = torch.tensor([prompt["prompt_ids"]])
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
        sent = _sent(kv, kind)
        squares += float((kv**2).sum())
        errors += float(((sent - kv) ** 2).sum())
        scale = kv.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
        largest = max(largest, float(((sent - kv).abs() / scale).max()))
        first = prompt["completion_ids"][0]
        exact, changed = _next_logits(model, kv, first), _next_logits(model, sent, first)
        logit_errors.append(float((changed - exact).pow(2).mean().sqrt() / exact.std()))
        same += int(exact.argmax() == changed.argmax())
    found = {"kv_rms": (errors / squares) ** 0.5, "kv_max": largest, "logit_rms": float(np.mean(logit_errors))}
    print(f"\n{kind}: {found}, next token the same for {same} of {len(PROMPTS)}, worst logits {max(logit_errors):.4f}")
    assert 0 < found["kv_rms"] < kv_rms
    assert 0 < found["kv_max"] < kv_max
    assert 0 < found["logit_rms"] < logit_rms
