from __future__ import annotations

import numpy as np
import pytest
import torch

from kvstore.reshard import compress as compress_module
from kvstore.reshard.compress import _fp8_table, _fp8_values, compress, compressed_bytes, expand
from kvstore.reshard.dtypes import convert, to_bfloat16, to_float32


def test_bfloat16_is_rounded_as_torch_does_it() -> None:
    random = np.random.default_rng(1)
    bits = random.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    edges = np.array([0, 0x80000000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 1], dtype=np.uint32)
    values = np.concatenate([bits, edges]).view(np.float32)
    values = values[~np.isnan(values)]
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert (to_bfloat16(values) == expected).all()


def test_a_nan_stays_a_nan_and_never_becomes_infinite() -> None:
    for bits in (0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001):
        word = to_bfloat16(np.array([bits], dtype=np.uint32).view(np.float32))
        assert np.isnan(to_float32(word, "bfloat16")).all()


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_widening_is_exact_for_every_value_there_is(dtype: str, kind: torch.dtype) -> None:
    words = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(words).view(kind).float().numpy()
    assert np.array_equal(to_float32(words, dtype), expected, equal_nan=True)


def test_to_float16_from_a_wider_range_is_refused() -> None:
    with pytest.raises(ValueError, match="infinite"):
        convert(np.zeros(2, dtype=np.uint32), "float32", "float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_is_off_by_at_most_half_a_step_of_its_scale(dtype: str) -> None:
    random = np.random.default_rng(2)
    values = (random.standard_normal((3, 2, 4, 16, 64)) * 10 ** random.uniform(-3, 2, (3, 2, 4, 16, 1))).astype("f4")
    words = {"float32": values.view(np.uint32), "bfloat16": to_bfloat16(values)}.get(
        dtype, values.astype(np.float16).view(np.uint16)
    )
    packed = np.empty(compressed_bytes(words.shape), dtype=np.uint8)
    compress(words, dtype, "int8", packed)
    got, exact = to_float32(expand(packed, words.shape, dtype, "int8"), dtype), to_float32(words, dtype)

    largest = np.abs(exact).max(axis=-1, keepdims=True)
    rounding = {"float32": 2**-23, "bfloat16": 2**-8, "float16": 2**-10}[dtype]
    assert (np.abs(got - exact) <= largest * (0.5 / 127 * 1.001 + rounding)).all()
    assert np.abs(got - exact).max() > 0, "nothing was compressed"


def test_fp8_is_the_nearest_value_that_torch_has() -> None:
    values = np.random.default_rng(3).standard_normal((50, 2, 16, 64)).astype(np.float32)
    words = to_bfloat16(values)
    packed = np.empty(compressed_bytes(words.shape), dtype=np.uint8)
    compress(words, "bfloat16", "fp8", packed)
    got = expand(packed, words.shape, "float32", "fp8").view(np.float32)

    exact = to_float32(words, "bfloat16")
    scales = np.abs(exact).max(axis=-1, keepdims=True) * np.float32(1 / 448)
    nearest = torch.from_numpy(exact / scales).to(torch.float8_e4m3fn).float().numpy() * scales
    error, least = np.abs(got - exact), np.abs(nearest - exact)
    assert (error <= least + np.abs(exact) * 2**-7).all(), "bfloat16 on the way may cost its last bit"
    assert (error <= np.abs(exact) / 16 * 1.07 + scales * 2**-9 * 0.5).all()


def test_every_fp8_byte_is_what_torch_reads_and_writes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(_fp8_values(), expected, equal_nan=True)
    words = np.arange(1 << 16, dtype=np.uint16)
    values = to_float32(words, "bfloat16")
    in_range = np.abs(values) <= 448  # beyond it we take the largest, torch NaN
    wanted = torch.from_numpy(values[in_range]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert (_fp8_table()[words[in_range]] == wanted).all()


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(kind: str) -> None:
    values = np.zeros((3, 1, 4), dtype=np.float32)
    values[1, 0, 2], values[2, 0, 1] = np.inf, np.nan
    packed = np.empty(compressed_bytes(values.shape), dtype=np.uint8)
    compress(values.view(np.uint32), "float32", kind, packed)
    got = expand(packed, values.shape, "float32", kind).view(np.float32)
    assert not got[0].any()
    assert not np.isfinite(got[1:]).any(), "damage was made to look sound"


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ends_come_to_the_same_bytes_with_and_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str
) -> None:
    if compress_module.native_rows() is None:
        pytest.skip("there is no compiler")
    random = np.random.default_rng(4)
    bits = random.integers(0, 1 << 32, (40, 2, 16, 33), dtype=np.uint32)  # all floats there are, NaN and infinite too
    values = np.concatenate([bits.view(np.float32), random.standard_normal((40, 2, 16, 33)).astype(np.float32)])
    words = values.view(np.uint32) if dtype == "float32" else to_bfloat16(values)
    found = []
    for _ in range(2):
        packed = np.empty(compressed_bytes(words.shape), dtype=np.uint8)
        with np.errstate(all="ignore"):
            compress(words, dtype, kind, packed)
            expanded = expand(packed, words.shape, dtype, kind)
        found.append((packed, expanded))
        monkeypatch.setattr(compress_module, "native_rows", lambda: None)
    (packed, expanded), (packed_plain, expanded_plain) = found
    num_scale_bytes = 4 * (words.size // 33)
    scales, scales_plain = (p[:num_scale_bytes].view(np.float32) for p in (packed, packed_plain))
    assert np.array_equal(scales, scales_plain, equal_nan=True)
    is_sound = np.isfinite(scales)
    codes, codes_plain = (p[num_scale_bytes:].reshape(-1, 33)[is_sound] for p in (packed, packed_plain))
    assert (codes == codes_plain).all()
    flat, flat_plain = (e.reshape(-1, 33)[is_sound] for e in (expanded, expanded_plain))
    assert (flat == flat_plain).all()
