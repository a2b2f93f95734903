"""One pass over the logits finds the first of the largest of each row, and every row with a NaN."""

from __future__ import annotations

import pytest
import torch

from engines.ext.library import load_kernels
from engines.sampling.peaks import find_peaks


@pytest.mark.parametrize("vocab_size", [1, 7, 16, 259, 1000])
@pytest.mark.parametrize("num_rows", [1, 5, 300])
def test_native_peaks_equal_those_of_torch_with_many_ties(num_rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    logits = torch.randint(-3, 4, (num_rows, vocab_size), generator=generator).float()
    logits[torch.rand(num_rows, vocab_size, generator=generator) < 0.3] = float("-inf")
    logits[0] = float("-inf")

    assert find_peaks(logits, load_kernels(torch.float32)) == find_peaks(logits, None)


@pytest.mark.parametrize("position", [0, 3, 255, 256, 258])
def test_a_nan_is_found_wherever_it_is_and_spoils_no_other_row(position: int) -> None:
    logits = torch.randn(4, 259)
    expected = logits.argmax(-1).tolist()
    logits[2, position] = float("nan")

    for kernels in (None, load_kernels(torch.bfloat16)):
        ids, broken = find_peaks(logits, kernels)
        assert broken == [2]
        assert [ids[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]


def test_rows_of_a_wider_tensor_are_taken_as_they_lie() -> None:
    logits = torch.randn(6, 40)
    assert find_peaks(logits[:, 4:30], load_kernels(torch.float32))[0] == logits[:, 4:30].argmax(-1).tolist()
