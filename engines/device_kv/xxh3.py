"""xxh3_64 (seed 0) of many equally long inputs at once, in torch: where the bytes are, such as on a GPU.

    input:  | block of 16 stripes | ... | last, shorter block | last 64 bytes |        stripe: 8 lanes of 64 bits
    lanes = start;  per block: lanes += what its stripes add, then a stir;  in the end: merge, avalanche

After the XXH3 chapter of the xxHash specification. What a stripe adds does not depend on the lanes, so that is computed
for all stripes of all inputs together; one after the other are only the stirs, one for each KiB.

torch has no unsigned 64-bit arithmetic: additions and products wrap in int64 to the same bits, right shifts are masked.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
import torch
from torch import Tensor

MIN_BYTES: Final = 241  # shorter inputs are hashed in other ways
STRIPE: Final = 64
BLOCK: Final = 16 * STRIPE
P32_1, P32_2, P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
P64_1, P64_2, P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
P64_4, P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
AVALANCHE: Final = 0x165667919E3779F9
START: Final = (P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1)
LOW: Final = 0xFFFFFFFF
SECRET: Final = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def digests(inputs: Tensor) -> Tensor:
    """xxh3_64 of each row, its 64 bits as int64, `[n]`, on the device of the rows.

    Needs about four times the memory of the inputs beside them.

    Args:
        inputs: `[n, length]` of uint8, each row contiguous; any device.

    Raises:
        ValueError: rows are shorter than `MIN_BYTES`.
    """
    num_inputs, length = inputs.shape
    if length < MIN_BYTES:
        raise ValueError(f"inputs of {length} bytes; expected at least {MIN_BYTES}, shorter ones are hashed otherwise")
    device = str(inputs.device)
    num_blocks = (length - 1) // BLOCK
    num_left = (length - 1 - num_blocks * BLOCK) // STRIPE
    lanes = _words(START, device).expand(num_inputs, 8).clone()
    if num_blocks:
        blocks = _as_words(inputs[:, : num_blocks * BLOCK]).view(num_inputs, num_blocks, 16, 8)
        added, key = _added(blocks, _stripe_secrets(device)), _secret(128, device)
        for i in range(num_blocks):
            lanes += added[:, i]
            _stir(lanes, key)
    if num_left:
        start = num_blocks * BLOCK
        left = _as_words(inputs[:, start : start + num_left * STRIPE]).view(num_inputs, num_left, 8)
        lanes += _added(left, _stripe_secrets(device)[:num_left])
    last = _as_words(inputs[:, length - STRIPE :]).view(num_inputs, 1, 8)
    lanes += _added(last, _secret(121, device)[None])
    return _merged(lanes, length, device)


def _as_words(inputs: Tensor) -> Tensor:
    """Little-endian words of 64 bits, `[n, bytes / 8]`. Copies where a row does not begin at a word."""
    is_aligned = inputs.storage_offset() % 8 == 0 and inputs.stride(0) % 8 == 0
    # Not `contiguous`, which leaves a single row where it is.
    return (inputs if is_aligned else inputs.clone(memory_format=torch.contiguous_format)).view(torch.int64)


def _added(stripes: Tensor, secrets: Tensor) -> Tensor:
    """What stripes `[..., stripes, 8]` add to the lanes, each with its secret `[stripes, 8]`: `[..., 8]`."""
    low = stripes ^ secrets
    high = (low >> 32).bitwise_and_(LOW)
    product = low.bitwise_and_(LOW).mul_(high).sum(dim=-2)
    return product + stripes.sum(dim=-2)[..., _neighbours(str(stripes.device))]


def _stir(lanes: Tensor, key: Tensor) -> None:
    """In place."""
    shifted = (lanes >> 47).bitwise_and_((1 << 17) - 1)
    lanes.bitwise_xor_(shifted).bitwise_xor_(key).mul_(P32_1)


def _merged(lanes: Tensor, length: int, device: str) -> Tensor:
    keyed = lanes ^ _secret(11, device)
    result = _fold(keyed[:, 0::2], keyed[:, 1::2]).sum(dim=-1) + _signed(length * P64_1)
    result ^= _shifted(result, 37)
    result *= _signed(AVALANCHE)
    return result ^ _shifted(result, 32)


def _fold(a: Tensor, b: Tensor) -> Tensor:
    """Both halves of the 128-bit product, one upon the other."""
    a_low, a_high, b_low, b_high = a & LOW, _shifted(a, 32), b & LOW, _shifted(b, 32)
    low_high, high_low = a_low * b_high, a_high * b_low
    middle = _shifted(a_low * b_low, 32) + (low_high & LOW) + (high_low & LOW)
    upper = a_high * b_high + _shifted(low_high, 32) + _shifted(high_low, 32) + _shifted(middle, 32)
    return (a * b) ^ upper


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 of the same lower 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


@cache
def _neighbours(device: str) -> Tensor:
    """Each lane also takes the plain word of the one beside it."""
    return torch.tensor([1, 0, 3, 2, 5, 4, 7, 6], device=device)


@cache
def _words(values: tuple[int, ...], device: str) -> Tensor:
    return torch.tensor([_signed(value) for value in values], dtype=torch.int64, device=device)


@cache
def _secret(offset: int, device: str) -> Tensor:
    """Eight words of the secret."""
    return _words(tuple(np.frombuffer(SECRET, "<u8", count=8, offset=offset).tolist()), device)


@cache
def _stripe_secrets(device: str) -> Tensor:
    """Of the 16 stripes of a block, `[16, 8]`: each begins 8 bytes behind the one before."""
    return torch.stack([_secret(8 * i, device) for i in range(16)])
