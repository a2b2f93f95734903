"""Rotary position embedding: one table of cosines and sines, made once, in fp32.

After RoFormer (Su et al., 2021); `llama3` and `yarn` scaling as in transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engines.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """`[head_dim / 2]` fp32: the angle by which one position turns each pair."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope)
    return plain


def _llama3(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Long waves are stretched by `factor`, short ones kept, those between blended."""
    length = rope.original_max_position_embeddings
    wavelengths = 2 * math.pi / plain
    stretched = torch.where(wavelengths > length / rope.low_freq_factor, plain / rope.factor, plain)
    smooth = (length / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    is_between = (wavelengths >= length / rope.high_freq_factor) & (wavelengths <= length / rope.low_freq_factor)
    return torch.where(is_between, blended, stretched)


def _yarn(plain: Tensor, rope: RopeConfig) -> Tensor:
    """Pairs that turn often within the original context are kept, those that turn little stretched, a ramp between."""
    dim = 2 * len(plain)

    def pair_of(num_turns: float) -> float:
        wavelength = rope.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)


class RopeTable:
    """Cosines and sines of all positions, `[max_positions, head_dim]` each, in the model's dtype."""

    def __init__(self, rope: RopeConfig, *, head_dim: int, max_positions: int, dtype: torch.dtype, device: str) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
        angles = torch.cat((angles, angles), dim=-1)
        # The angles are made in fp32 and only their cosines are rounded, as transformers does: bf16 positions collide.
        self.cos = (angles.cos() * rope.attention_factor).to(device=device, dtype=dtype)
        self.sin = (angles.sin() * rope.attention_factor).to(device=device, dtype=dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), `[num_tokens, 1, head_dim]` each: the same for all heads."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` `[num_tokens, num_heads, head_dim]`; pairs are (i, i + head_dim / 2), the Hugging Face layout."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos + turned * sin
