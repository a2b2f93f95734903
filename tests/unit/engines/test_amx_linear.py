"""Linear layers on tiles: right, in the documented order of addition, and each row the same bits in every company.

On the emulation everywhere; on AMX where the CPU has it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines.ext.library import load_kernels
from engines.linear import amx
from engines.linear.amx import Tiles, find_tiles
from engines.linear.choose import choose_linear
from engines.linear.native_linear import INT8, NativeBackend, NativeLinear

BF16 = torch.bfloat16
SHAPES = [(160, 96), (33, 64), (100, 97), (31, 1), (64, 33), (577, 1536)]  # (out, in): whole panels and tiles, parts
MOST_ROWS = 300


@pytest.fixture(params=list(Tiles), ids=lambda tiles: tiles.name.lower())
def tiles(request: pytest.FixtureRequest) -> Tiles:
    """Both; AMX only where the machine has it."""
    kernels = load_kernels(BF16)
    if request.param is Tiles.AMX and kernels.find_amx() != amx.READY:
        pytest.skip("this CPU has no AMX that can be used")
    if not kernels.has_emulated_tiles():
        pytest.skip("no tiles: neither x86-64 nor FMA")
    return Tiles(request.param)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(weight: Tensor, bias: Tensor | None, tiles: Tiles | None) -> NativeLinear:
    return NativeBackend(load_kernels(BF16), tiles=tiles).make(weight, bias)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(BF16)


def as_documented(x: Tensor, weight: Tensor) -> Tensor:
    """TDPBF16PS over whole tiles of 32 inputs: two chains of pairs, added to each other and then to what was there.

    A product of two bfloat16 numbers is exact in fp32, so one that is added with one rounding is a fused one.
    """
    missing = -x.shape[1] % 32
    x, weight = (torch.nn.functional.pad(t, (0, missing)).float() for t in (x, weight))
    total = torch.zeros(x.shape[0], weight.shape[0])
    for begin in range(0, x.shape[1], 32):
        chains = torch.zeros(2, *total.shape)
        for k in range(begin, begin + 32):
            chains[k % 2] += x[:, k, None] * weight[:, k]
        total += chains[0] + chains[1]
    return total


@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_right_and_their_wide_form_is_not_rounded(
    tiles: Tiles, num_out: int, num_in: int, has_bias: bool
) -> None:
    weight, x = random(num_out, num_in), random(MOST_ROWS, num_in, seed=2)
    bias = random(num_out, seed=3) if has_bias else None
    layer = make(weight, bias, tiles)

    wide = layer.wide(x)

    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(wide.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(layer(x), wide.to(BF16))


@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_sums_are_added_up_as_intel_documents(tiles: Tiles, num_out: int, num_in: int) -> None:
    weight, x = random(num_out, num_in), random(37, num_in, seed=2)

    assert torch.equal(make(weight, None, tiles).wide(x), as_documented(x, weight))


@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_a_row_does_not_depend_on_the_batch_or_on_the_number_of_threads(
    tiles: Tiles, num_out: int, num_in: int
) -> None:
    layer = make(random(num_out, num_in), random(num_out, seed=3), tiles)
    x = random(MOST_ROWS, num_in, seed=2)
    torch.set_num_threads(1)
    whole = layer(x)

    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        assert torch.equal(layer(x), whole)
        for num_rows in (*range(1, 36), 63, 64, 65, 127):
            lo = (num_rows * 7) % (MOST_ROWS - num_rows)
            assert torch.equal(layer(x[lo : lo + num_rows]), whole[lo : lo + num_rows]), (num_threads, num_rows)


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 70),
    num_in=st.integers(1, 130),
    num_out=st.integers(1, 80),
    gap=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_any_shape_gives_the_documented_bits_and_reads_nothing_beside_its_rows(
    num_rows: int, num_in: int, num_out: int, gap: int, seed: int
) -> None:
    kernels = load_kernels(BF16)
    if not kernels.has_emulated_tiles():
        pytest.skip("no tiles: neither x86-64 nor FMA")
    x, weight = random(num_rows, num_in, seed=seed), random(num_out, num_in, seed=seed + 1)
    apart = torch.full((num_rows, num_in + gap), float("nan"), dtype=BF16)
    apart[:, :num_in] = x

    for each in Tiles if kernels.find_amx() == amx.READY else [Tiles.EMULATED]:
        assert torch.equal(make(weight, None, each).wide(apart[:, :num_in]), as_documented(x, weight))


def test_numbers_that_are_not_finite_stay_in_their_row_and_in_their_output(tiles: Tiles) -> None:
    weight, x = random(70, 97), random(40, 97, seed=2)
    layer = make(weight, None, tiles)
    plain = layer.wide(x)
    for value in (float("inf"), float("-inf"), float("nan")):
        broken = x.clone()
        broken[3, 96] = value
        found = layer.wide(broken)
        assert not found[3].isfinite().any()
        assert torch.equal(found[4:], plain[4:])

    infinite = weight.clone()
    infinite[5, 0] = float("inf")
    found = make(infinite, None, tiles).wide(x)
    assert not found[:, 5].isfinite().any()
    assert torch.equal(found[:, 6:], plain[:, 6:])


def test_denormals_are_zeros_going_in_and_coming_out(tiles: Tiles) -> None:
    tiny = torch.tensor([2.0**-126, 2.0**-127, 2.0**-70], dtype=torch.float64).to(BF16)
    assert tiny[1] > 0
    weight = torch.eye(3, dtype=BF16) * torch.tensor([1.0, 2.0, 2.0**-70], dtype=BF16)

    found = make(weight, None, tiles).wide(tiny[None])

    # The smallest normal stays; a denormal is a zero before it is doubled; 2^-140 would be one.
    assert found.tolist() == [[2.0**-126, 0.0, 0.0]]


def test_amx_is_documented_to_add_in_another_order_than_avx512() -> None:
    """So engines with and without it may differ in the last bits, which is why the tests above look at single bits."""
    weight, x = random(160, 96), random(32, 96, seed=2)
    avx, emulated = make(weight, None, None).wide(x), make(weight, None, Tiles.EMULATED).wide(x)
    torch.testing.assert_close(avx, emulated, rtol=1e-4, atol=1e-4)
    assert not torch.equal(avx, emulated)


def test_only_plain_bfloat16_weights_go_on_tiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(amx.VARIABLE, "emulate")
    for dtype in (BF16, torch.float32):
        kernels = load_kernels(dtype)
        for quantization in (None, INT8):
            with caplog.at_level(logging.INFO):
                backend = choose_linear("native", dtype=dtype, device="cpu", kernels=kernels, quantization=quantization)
            assert isinstance(backend, NativeBackend)
            on_tiles = dtype == BF16 and quantization is None
            assert backend.tiles is (Tiles.EMULATED if on_tiles else None)
    assert "linear layers: native, on emulated AMX tiles (slow)" in caplog.text


def test_what_keeps_amx_from_being_used_is_said_once_and_avx512_does_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(amx.VARIABLE, raising=False)
    kernels = load_kernels(BF16)
    for state, word in ((4, "permission"), (5, "signal"), (6, "other bits")):
        caplog.clear()
        monkeypatch.setattr(kernels, "find_amx", lambda state=state: state)
        backend = choose_linear("native", dtype=BF16, device="cpu", kernels=kernels)
        assert isinstance(backend, NativeBackend) and backend.tiles is None
        assert len(caplog.records) == 1 and word in caplog.text
    caplog.clear()
    monkeypatch.setattr(kernels, "find_amx", lambda: 2)
    assert find_tiles(kernels) is None and not caplog.records

    monkeypatch.setattr(kernels, "find_amx", lambda: amx.READY)
    assert find_tiles(kernels) is Tiles.AMX
    monkeypatch.setenv(amx.VARIABLE, "off")
    assert find_tiles(kernels) is None


def test_the_self_check_survives_a_cpu_that_does_not_know_the_instructions() -> None:
    kernels = load_kernels(BF16)
    if not kernels.has_emulated_tiles():
        pytest.skip("no tiles: neither x86-64 nor FMA")
    state = kernels.find_amx()
    assert kernels.try_amx() == (state if state in (amx.READY, 6) else 5)
