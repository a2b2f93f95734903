"""Norm, head and peaks in one C++ call against the same one by one: every bit of the logits, every peak, every NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from engines.ext.library import load_kernels
from engines.ext.row_ops import NativeRowOps
from engines.linear.native_linear import INT8, NativeBackend, NativeLinear, Quantization
from engines.linear.torch_linear import TorchBackend
from engines.models.native_head import NativeHead
from engines.sampling.peaks import find_peaks

HIDDEN, EPS = 96, 1e-5
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(weight: Tensor, quantization: Quantization | None = None) -> tuple[NativeHead, Tensor, NativeLinear]:
    """A head, and its parts."""
    kernels = load_kernels(weight.dtype)
    norm = torch.rand(HIDDEN).to(weight.dtype) + 0.5
    linear = NativeBackend(kernels, quantization).make(weight)
    head = NativeHead.of(norm, linear, EPS, kernels)
    assert head is not None
    return head, norm, linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("vocab_size", [1, 31, 33, 259, 1000])
@pytest.mark.parametrize("num_rows", [1, 2, 13, 50])
def test_one_call_equals_norm_head_and_peaks_with_many_ties(
    dtype: torch.dtype, num_threads: int, vocab_size: int, num_rows: int
) -> None:
    generator = torch.Generator().manual_seed(vocab_size * num_rows)
    few = torch.randn(7, HIDDEN, generator=generator)
    weight = few[torch.randint(0, 7, (vocab_size,), generator=generator)].to(dtype)
    head, norm, linear = make(weight)
    hidden = torch.randn(num_rows, HIDDEN, generator=generator).to(dtype)
    torch.set_num_threads(num_threads)

    logits, ids, broken = head.run(hidden, with_maxima=True)

    kernels = load_kernels(dtype)
    assert torch.equal(logits, linear.wide(NativeRowOps(kernels).norm(hidden, norm, EPS)))
    assert (ids, broken) == find_peaks(logits, None) == find_peaks(logits, kernels)
    maxima = head.maxima_of(logits)
    assert maxima is not None
    for lo in range(0, vocab_size, maxima.group):
        largest = logits[:, lo : lo + maxima.group].amax(-1)
        assert torch.equal(torch.from_numpy(maxima.values[:, lo // maxima.group]), largest)
    assert head.maxima_of(logits.clone()) is None
    assert head.maxima_of(head.run(hidden)[0]) is None


@pytest.mark.parametrize("quantization", [INT8, Quantization(bits=4, group=32)])
def test_quantised_heads_find_the_same_peaks(quantization: Quantization) -> None:
    head, _, _ = make(torch.randn(500, HIDDEN).to(torch.bfloat16), quantization)
    torch.set_num_threads(2)

    logits, ids, broken = head.run(torch.randn(20, HIDDEN).to(torch.bfloat16))

    assert (ids, broken) == find_peaks(logits, None)


@pytest.mark.parametrize("position", [0, 31, 32, 257, 258])
def test_a_nan_is_found_wherever_it_is_and_spoils_no_other_row(position: int) -> None:
    weight = torch.randn(259, HIDDEN)
    weight[position, 0] = float("inf")  # times zero is NaN
    head, _, _ = make(weight)
    hidden = torch.randn(14, HIDDEN).abs()
    hidden[13, 0] = 0.0
    torch.set_num_threads(2)

    logits, ids, broken = head.run(hidden)

    assert logits[13, position].isnan()
    assert broken == [13]
    assert ids[:13] == [position] * 13


def test_rows_of_nothing_but_minus_infinity_have_their_peak_at_the_first_id() -> None:
    head, _, _ = make(torch.full((100, HIDDEN), float("-inf")))
    torch.set_num_threads(3)

    assert head.run(torch.rand(3, HIDDEN) + 0.1)[1:] == ([0, 0, 0], [])


def test_a_head_of_torch_is_called_part_by_part() -> None:
    linear = TorchBackend().make(torch.randn(50, HIDDEN))
    assert NativeHead.of(torch.ones(HIDDEN), linear, EPS, load_kernels(torch.float32)) is None
