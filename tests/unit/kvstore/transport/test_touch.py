from __future__ import annotations

import logging
import os

import pytest

from kvstore.transport import KVRegion, touch


def num_pages(region: KVRegion) -> int:
    return os.fstat(region.fd).st_blocks * 512 // os.sysconf("SC_PAGE_SIZE")


def test_touching_makes_all_pages_and_changes_none(caplog: pytest.LogCaptureFixture) -> None:
    region = KVRegion.create(40, 1, 1 << 20)
    region.buffer[5] = 9
    assert num_pages(region) < 600

    with caplog.at_level(logging.INFO):
        touch.start_touching(region).join(30)

    assert num_pages(region) == region.num_bytes // os.sysconf("SC_PAGE_SIZE")
    assert (region.buffer[5], sum(region.buffer[:4096])) == (9, 9)
    assert "40 MiB touched in" in caplog.text


def test_touching_stops_where_memory_is_short(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    region = KVRegion.create(40, 1, 1 << 20)
    shares = iter([0.9, 0.1])
    monkeypatch.setattr(touch, "available_share", lambda: next(shares))

    with caplog.at_level(logging.INFO):
        touch.start_touching(region).join(30)

    assert num_pages(region) == touch.SLICE_BYTES // os.sysconf("SC_PAGE_SIZE")
    assert "32 of 40 MiB touched" in caplog.text
