"""Weights as whole numbers of 8 or 4 bits with scales, in the order that cpp/formats.h reads.

Symmetric, rounded to the nearest. int8: -127..127 and one scale per output. int4: -8..7 and one scale per output and
group of inputs; the number furthest from zero becomes -8, as llama.cpp's Q4_0 has it, which uses all sixteen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def quantize(weight: Tensor, *, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """`weight` `[out, in]` -> whole numbers int8 `[out, in]` and scales fp32 `[out, groups]`; products are the weight.

    Args:
        bits: 8 or 4.
        group: inputs per scale; the last group may be shorter.
    """
    num_out, num_in = weight.shape
    num_groups = -(-num_in // group)
    groups = F.pad(weight.float(), (0, num_groups * group - num_in)).view(num_out, num_groups, group)
    furthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = furthest.abs() / 127 if bits == 8 else furthest / -8
    numbers = torch.where(scales == 0, 0.0, groups / scales).round_()
    numbers = numbers.clamp_(-127, 127) if bits == 8 else numbers.clamp_(-8, 7)
    return numbers.to(torch.int8).view(num_out, -1)[:, :num_in], scales.squeeze(2)


def pack_numbers(numbers: Tensor, *, bits: int, lanes: int, pair: int) -> Tensor:
    """`[panels * 2 * lanes, in]` int8 -> `[panels, bytes]` uint8: the units of cpp/formats.h.

    Args:
        lanes: floats in a vector of the kernels.
        pair: inputs that one instruction multiplies. `in` is a multiple of it; of twice as many with 4 bits.
    """
    num_in = numbers.shape[1]
    if bits == 8:
        # [panel, half, lane, depth, pair] -> [panel, depth, lane, pair, half]
        split = numbers.view(-1, 2, lanes, num_in // pair, pair).permute(0, 3, 2, 4, 1)
        signed_magnitude = split.abs().to(torch.uint8) | (split < 0).to(torch.uint8) << 7
        return signed_magnitude.flatten(1).contiguous()
    # [panel, half, lane, depth, which, pair] -> [panel, depth, lane, pair, which, half]
    split = (numbers + 8).to(torch.uint8).view(-1, 2, lanes, num_in // (2 * pair), 2, pair).permute(0, 3, 2, 5, 4, 1)
    return (split[..., 0] | split[..., 1] << 4).flatten(1).contiguous()


def pack_scales(scales: Tensor, *, lanes: int) -> Tensor:
    """`[panels * 2 * lanes, groups]` -> `[panels, groups, 2 * lanes]`, fp32."""
    return scales.view(-1, 2 * lanes, scales.shape[1]).transpose(1, 2).contiguous()
