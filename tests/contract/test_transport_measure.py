"""The measuring program moves what it says it moves, in every case, and leaves nobody behind."""

from __future__ import annotations

from kvstore.transport.measure_rounds import MAX_PAIRS, NOTICES_PER_ROUND, PROTOCOLS, measure_rounds, specs


def test_a_round_measures_every_case_once() -> None:
    measured = measure_rounds(1, 2 << 20)

    (one,) = measured.rounds
    expected = {"memcpy", *(spec.name for spec in specs(2 << 20))}
    expected |= {f"{protocol}_pairs_{n}" for protocol in PROTOCOLS for n in range(1, MAX_PAIRS + 1)}
    assert set(one.seconds) == expected
    assert all(seconds > 0 for seconds in one.seconds.values())
    assert {protocol: len(notices) for protocol, notices in one.notice_s.items()} == dict.fromkeys(
        PROTOCOLS, NOTICES_PER_ROUND
    )
