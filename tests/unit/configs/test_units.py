from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("2GiB", 2 << 30), ("2GB", 2 * 10**9), ("1.5GiB", 3 << 29), ("20 GiB", 20 << 30), ("512B", 512), ("4kB", 4000)],
)
def test_sizes_mean_what_their_unit_says(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@given(st.integers(min_value=0, max_value=1 << 60))
def test_a_size_reads_back_exactly(num_bytes: int) -> None:
    assert parse_size(format_size(num_bytes)) == num_bytes
