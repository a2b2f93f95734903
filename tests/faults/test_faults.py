"""The short form of the fault storm; `make faults` is the long one."""

from __future__ import annotations

import pytest

from tests.faults.__main__ import Storm
from tests.faults.kinds import KINDS


def test_no_fault_of_a_short_storm_does_harm() -> None:
    with Storm(seed=7, process_every=120) as storm:
        storm.run(480)
        report = storm.report()
    assert report["faults"] == 480
    assert set(storm.done) >= {kind.__name__ for kind in KINDS}
    assert sum(count for name, count in storm.done.items() if name.startswith("process")) == 4


def test_a_storm_notices_when_damaged_pages_arrive() -> None:
    """Without checksums a flipped bit goes through: if this passed unseen, the storm would prove nothing."""
    with Storm(seed=7, checksum=False) as storm, pytest.raises(AssertionError, match=r"fault \d+ \(.*arrived"):
        storm.run(200)
