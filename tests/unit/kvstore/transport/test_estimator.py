from __future__ import annotations

import pytest

from kvstore.transport.estimator import LinkEstimate, LinkEstimates, LinkFigures, kind_of, table_figures

GIB = 1 << 30


@pytest.mark.parametrize(
    ("protocol", "gbps", "base_ms", "total_ms"),
    [
        ("rdma", 100.0, 4.0, 423.4),
        ("rdma", 0.0, 4.0, 423.4),  # the table's own bandwidth
        ("nvlink", 0.0, 0.5, 12.2),
        ("ethernet", 10.0, 20.0, 4214.3),
    ],
)
def test_a_70b_prompt_of_2000_tokens_takes_what_the_table_says(
    protocol: str, gbps: float, base_ms: float, total_ms: float
) -> None:
    figures = table_figures(protocol, gbps)

    assert figures.base_s == pytest.approx(base_ms / 1e3)
    assert figures.transfer_s(2000 * 2_621_440) * 1e3 == pytest.approx(total_ms, abs=0.1)


def test_the_setting_speaks_of_networks_only() -> None:
    assert table_figures("shm", 1.0) == table_figures("shm")
    assert table_figures("ethernet", 1.0).bytes_per_s == 125e6


def test_tcp_is_ethernet_between_hosts() -> None:
    assert kind_of("tcp", is_same_host=False) == "ethernet"
    assert kind_of("tcp", is_same_host=True) == "tcp"


@pytest.mark.parametrize("gigabytes_per_s", [0.2, 2.0, 40.0])
@pytest.mark.parametrize("base_ms", [0.05, 1.0, 30.0])
def test_a_link_learns_what_it_really_is(gigabytes_per_s: float, base_ms: float) -> None:
    real = LinkFigures(base_ms / 1e3, gigabytes_per_s * 1e9)
    link = LinkEstimate(table_figures("ethernet", 10.0))
    sizes = [64 << 10, 8 << 20, GIB]

    for k in range(300):
        link.learn(sizes[k % 3], real.transfer_s(sizes[k % 3]))

    for num_bytes in sizes:
        assert link.predict_s(num_bytes) == pytest.approx(real.transfer_s(num_bytes), rel=0.25)


def test_transfers_of_one_size_are_predicted_well_soon() -> None:
    real = LinkFigures(0.002, 3e9)
    link = LinkEstimate(table_figures("ethernet"))

    for _ in range(20):
        link.learn(16 << 20, real.transfer_s(16 << 20))

    assert link.predict_s(16 << 20) == pytest.approx(real.transfer_s(16 << 20), rel=0.2)


def test_a_link_that_slows_down_is_noticed() -> None:
    link = LinkEstimate(LinkFigures(0.001, 10e9))
    for _ in range(50):
        link.learn(GIB, 0.001 + GIB / 10e9)

    for _ in range(30):
        link.learn(GIB, 0.001 + GIB / 1e9)

    assert link.predict_s(GIB) == pytest.approx(1.07, rel=0.1)


def test_what_has_no_bytes_or_no_time_teaches_nothing() -> None:
    estimates = LinkEstimates(own_host_id="h")
    before = estimates.predict_s("far", "tcp", GIB)

    estimates.finished("far", "tcp", 0, 1.0)
    estimates.finished("far", "tcp", GIB, 0.0)

    assert estimates.predict_s("far", "tcp", GIB) == before
    assert estimates.totals["link_transfers"] == 0


def test_predicted_and_measured_are_counted_side_by_side() -> None:
    estimates = LinkEstimates(own_host_id="h", gbps=8.0)

    estimates.finished("far", "tcp", 1_000_000_000, 2.0)

    assert estimates.totals["link_predicted_s"] == pytest.approx(1.02)
    assert estimates.totals["link_measured_s"] == 2.0
    assert estimates.totals["link_error_s"] == pytest.approx(0.98)


def test_reports_name_each_host_and_what_to_expect_of_others() -> None:
    estimates = LinkEstimates(own_host_id="h")

    estimates.finished("h", "shm", GIB, 0.5)

    unmet, own = estimates.reports
    assert (unmet.host_id, unmet.num_transfers) == ("", 0)
    assert (own.host_id, own.protocol, own.num_transfers) == ("h", "shm", 1)
    assert own.transfer_s == pytest.approx(0.5, rel=0.05)
    assert unmet.transfer_s > own.transfer_s
