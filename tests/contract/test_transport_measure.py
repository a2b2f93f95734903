"""The measuring program moves what it says it moves, in every case, and leaves nobody behind."""

from __future__ import annotations

import pytest

from kvstore.transport.measure_rounds import NOTICES_PER_ROUND, PAIR_COUNTS, PROTOCOLS, measure_rounds, specs
from tests.contract.transport_helpers import needs_nixl


@pytest.mark.parametrize("protocols", [PROTOCOLS, pytest.param(("rdma",), marks=needs_nixl)])
def test_a_round_measures_every_case_once(protocols: tuple[str, ...]) -> None:
    measured = measure_rounds(1, 2 << 20, protocols)

    (one,) = measured.rounds
    expected = {"memcpy", "hash", "copy_and_hash", *(spec.name for spec in specs(2 << 20, protocols))}
    expected |= {f"{protocol}_pairs_{n}" for protocol in protocols for n in PAIR_COUNTS}
    assert set(one.seconds) == expected
    assert all(seconds > 0 for seconds in one.seconds.values())
    assert {protocol: len(notices) for protocol, notices in one.notice_s.items()} == dict.fromkeys(
        protocols, NOTICES_PER_ROUND
    )


def test_only_the_cases_that_are_asked_for_are_measured_beside_memcpy() -> None:
    (one,) = measure_rounds(1, 2 << 20, PROTOCOLS, ("notice", "shm_16k")).rounds

    assert set(one.seconds) == {"memcpy", "shm_16k", "shm_16k_checked"}
    assert set(one.notice_s) == {"shm", "tcp"}


def test_a_word_that_is_in_no_case_is_refused() -> None:
    with pytest.raises(ValueError, match="no case"):
        measure_rounds(1, 2 << 20, PROTOCOLS, ("shn",))
