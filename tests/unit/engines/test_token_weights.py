"""Weights are the same whole numbers in torch and in C++, whatever the CPU has: so all choose the same tokens."""

from __future__ import annotations

import ctypes
import platform
from ctypes import c_double, c_float, c_int64, c_void_p

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.ext.build import SAMPLING_SOURCES, build_library
from engines.sampling.choose import UNITS, Filters, choose, weigh
from kvstore.native import Sources

# Vectors of 4, 8 and, where the CPU has them, 16 floats.
CPUS = ("x86-64", "x86-64-v3", "native") if platform.machine() == "x86_64" else ("native",)
FLAGS = [flag for flag in SAMPLING_SOURCES.flags if not flag.startswith("-march")]


@pytest.fixture(scope="module", params=CPUS)
def library(request: pytest.FixtureRequest) -> ctypes.CDLL:
    # Inline variables of C++ would else be shared with the library that other tests have loaded.
    flags = (*FLAGS, f"-march={request.param}", "-fno-gnu-unique")
    library = ctypes.CDLL(str(build_library(Sources(SAMPLING_SOURCES.folder, SAMPLING_SOURCES.main, flags))))
    library.weigh_row.argtypes = [c_int64, c_void_p, c_float, c_double, c_void_p]
    library.choose_tokens.argtypes = [c_int64, c_int64, *[c_void_p] * 4, c_int64, c_int64, c_void_p, c_int64]
    library.weigh_row.restype = library.choose_tokens.restype = None
    return library


def weights(library: ctypes.CDLL, row: Tensor, coldness: float) -> Tensor:
    found = torch.empty(len(row), dtype=torch.int64)
    library.weigh_row(len(row), row.data_ptr(), float(row.max()), coldness, found.data_ptr())
    return found


def chosen(library: ctypes.CDLL, logits: Tensor, columns: NDArray[np.float64]) -> list[int]:
    num_rows, vocab_size = logits.shape
    index, ids = np.arange(num_rows), np.empty(num_rows, dtype=np.int64)
    library.choose_tokens(
        num_rows, vocab_size, logits.data_ptr(), index.ctypes.data, columns.ctypes.data, None, 0, 0, ids.ctypes.data, 1
    )
    return list(ids.tolist())


@pytest.mark.parametrize("temperature", [1e-5, 0.3, 0.7, 1.0, 1.3, 100.0])
def test_a_million_weights_are_those_of_torch_bit_for_bit(library: ctypes.CDLL, temperature: float) -> None:
    row = torch.randn(170_000, generator=torch.Generator().manual_seed(1)) * 8
    row[::1000] = -torch.inf
    below = row.double() - row.max().double()
    expected = weigh(below, torch.tensor(1 / temperature, dtype=torch.float64))
    assert torch.equal(weights(library, row, 1 / temperature), expected)
    exact = torch.exp(below / temperature) * UNITS
    assert ((expected - exact).abs() <= 0.51 + exact * 6e-12).all()
    assert expected.max() == UNITS
    assert (expected[::1000] == 0).all()


@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("has_ties", [False, True])
def test_every_cpu_chooses_the_tokens_of_torch_from_rows_of_any_width(
    library: ctypes.CDLL, spread: float, has_ties: bool
) -> None:
    generator, rng = torch.Generator().manual_seed(4), np.random.default_rng(4)
    logits = torch.randn(24, 30_001, generator=generator) * spread
    logits[::4, :60] += 8
    logits[::6][torch.rand(logits[::6].shape, generator=generator) < 0.5] = -torch.inf
    if has_ties:
        logits = logits.bfloat16().float()
    options = ([0.3, 0.7, 1.0, 2.0], [0, 0, 20, 300, 5000, 20_000], [1.0, 0.95, 0.5], [0.0, 0.0, 1e-5, 0.01, 1.0])
    columns = np.stack([*(rng.choice(values, 24) for values in options), rng.random(24)])
    assert chosen(library, logits, columns) == choose(logits, Filters.of(columns)).tolist()


def test_a_row_of_equal_logits_with_some_others_is_cut_where_the_sums_say(library: ctypes.CDLL) -> None:
    logits = torch.zeros(3, 40_000)
    logits[1, 7::50] = 1.0
    logits[2, ::2] = -torch.inf
    uniforms = np.array([0.0, 0.5, 1 - 2.0**-53])
    for filters in ((1.0, 0, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 30_000, 1.0, 0.0), (1.0, 0, 1.0, 0.99)):
        for uniform in uniforms:
            columns = np.array([[*filters, uniform]] * 3, dtype=np.float64).T.copy()
            assert chosen(library, logits, columns) == choose(logits, Filters.of(columns)).tolist()
