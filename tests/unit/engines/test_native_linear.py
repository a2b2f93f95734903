"""The C++ linear layers: right, and each row the same bits whatever stands beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from engines.errors import DeviceUnavailable
from engines.ext.library import load_kernels
from engines.linear.choose import choose_linear
from engines.linear.native_linear import NativeBackend, NativeLinear

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(160, 96), (33, 64), (100, 97), (31, 1), (577, 1536)]  # (out, in): whole panels, parts of one, odd depths
MOST_ROWS = 512


def make(dtype: torch.dtype, num_out: int, num_in: int, *, has_bias: bool) -> tuple[NativeLinear, torch.Tensor]:
    """A layer, and what it should give for `rows`, computed in float64."""
    weight = torch.randn(num_out, num_in).to(dtype)
    bias = torch.randn(num_out).to(dtype) if has_bias else None
    layer = NativeBackend(load_kernels(dtype)).make(weight, bias)
    expected = torch.nn.functional.linear(
        rows(dtype, num_in).double(), weight.double(), None if bias is None else bias.double()
    )
    return layer, expected


def rows(dtype: torch.dtype, num_in: int) -> torch.Tensor:
    return torch.randn(MOST_ROWS, num_in, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_right_and_their_wide_form_is_not_rounded(
    dtype: torch.dtype, num_out: int, num_in: int, has_bias: bool
) -> None:
    layer, expected = make(dtype, num_out, num_in, has_bias=has_bias)
    x = rows(dtype, num_in)

    wide = layer.wide(x)

    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(layer(x), wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_out", "num_in"), SHAPES)
def test_a_row_does_not_depend_on_the_batch_or_on_the_number_of_threads(
    dtype: torch.dtype, num_out: int, num_in: int
) -> None:
    layer, _ = make(dtype, num_out, num_in, has_bias=True)
    x = rows(dtype, num_in)
    torch.set_num_threads(1)
    whole = layer(x)

    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        assert torch.equal(layer(x), whole)
        for num_rows in (*range(1, 40), 127, 300):
            lo = (num_rows * 7) % (MOST_ROWS - num_rows)
            assert torch.equal(layer(x[lo : lo + num_rows]), whole[lo : lo + num_rows]), (num_threads, num_rows)


def test_rows_may_lie_apart_and_numbers_that_are_not_finite_stay_in_their_row() -> None:
    layer, _ = make(torch.bfloat16, 160, 96, has_bias=False)
    x = rows(torch.bfloat16, 96)
    apart = torch.full((MOST_ROWS, 200), float("nan"), dtype=torch.bfloat16)
    apart[:, :96] = x
    assert torch.equal(layer(apart[:, :96]), layer(x))

    broken = x.clone()
    broken[3, 5] = float("inf")
    found = layer(broken)

    assert not found[3].isfinite().any()
    assert torch.equal(found[4:], layer(x)[4:])


def test_native_asked_for_by_name_is_not_replaced(caplog: pytest.LogCaptureFixture) -> None:
    kernels = load_kernels(torch.float32)
    assert choose_linear("native", dtype=torch.float32, device="cpu", kernels=kernels).name == "native"
    with pytest.raises(DeviceUnavailable, match=r"C\+\+ kernels"):
        choose_linear("native", dtype=torch.float32, device="cpu")
    with caplog.at_level(logging.INFO):
        assert choose_linear("auto", dtype=torch.float32, device="cpu").name == "onednn"
    assert "native: there are no C++ kernels" in caplog.text


def test_auto_takes_native_only_where_it_was_measured_to_be_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert choose_linear("auto", dtype=torch.bfloat16, device="cpu", kernels=kernels).name == "native"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert choose_linear("auto", dtype=torch.bfloat16, device="cpu", kernels=kernels).name != "native"
