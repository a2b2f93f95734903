"""How long a transfer takes: base latency + bytes / bandwidth, from a table at first, then from finished transfers.

    table (protocol, `transfer.gbps`) ──▶ LinkEstimate ◀── (bytes, seconds) of each transfer that was handed over
                                              └─▶ predict_s: routing, `celeriac kv estimate`, predicted against measured

Pure: no clock, no socket. Bytes and seconds are those of moving pages, waits for compute are not in them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvstore.link_report import LinkReport

NEWEST_WEIGHT: Final = 0.1  # of the newest transfer, once ten are known; before, all weigh the same
LEAST_LEFT: Final = 0.25  # of a figure after one correction: neither may become 0 by one odd measurement
MAX_LINKS: Final = 1024


@dataclass(frozen=True, slots=True)
class LinkKind:
    """A row of the table: what to expect before anything was measured."""

    base_low_s: float
    base_high_s: float
    gbps: float
    is_network: bool  # `transfer.gbps` speaks of it

    @property
    def base_s(self) -> float:
        return (self.base_low_s + self.base_high_s) / 2


# Bases are what deployments report (a registration, a rendezvous, a notice), not what the wire could do. Bandwidths
# are one direction of the usual hardware: InfiniBand EDR, NVLink 4, 10 GbE; shm and tcp are two slow cores.
TABLE: Final[dict[str, LinkKind]] = {
    "rdma": LinkKind(0.003, 0.005, 100.0, is_network=True),
    "nvlink": LinkKind(0.0005, 0.0005, 3600.0, is_network=False),
    "ethernet": LinkKind(0.020, 0.020, 10.0, is_network=True),
    "shm": LinkKind(0.0002, 0.0002, 32.0, is_network=False),
    "tcp": LinkKind(0.0005, 0.0005, 8.0, is_network=False),  # to a process of this host
}


@dataclass(frozen=True, slots=True)
class LinkFigures:
    """Base latency and bandwidth of a link."""

    base_s: float
    bytes_per_s: float

    def transfer_s(self, num_bytes: float) -> float:
        return self.base_s + num_bytes / self.bytes_per_s


def table_figures(protocol: str, gbps: float = 0.0) -> LinkFigures:
    """The table's row; `gbps` replaces its bandwidth where that is a network's, and 0 keeps it.

    Raises:
        KeyError: the table has no such protocol.
    """
    kind = TABLE[protocol]
    return LinkFigures(kind.base_s, (gbps if gbps and kind.is_network else kind.gbps) * 1e9 / 8)


def kind_of(protocol: str, *, is_same_host: bool) -> str:
    """The row for a connection of `KVNode`: tcp to another host is Ethernet until it has shown what it is."""
    return "ethernet" if protocol == "tcp" and not is_same_host else protocol


class LinkEstimate:
    """Learned figures of one link.

    The error of each prediction is shared out by the squares of its two parts (both are known equally well, relative
    to their size): a long transfer corrects the bandwidth, a short one the base. While all transfers have one size,
    nothing drifts apart, as a regression over such points would.
    """

    def __init__(self, start: LinkFigures) -> None:
        self.num_transfers = 0
        self._base_s = start.base_s
        self._s_per_byte = 1 / start.bytes_per_s

    @property
    def figures(self) -> LinkFigures:
        return LinkFigures(self._base_s, 1 / self._s_per_byte)

    def predict_s(self, num_bytes: float) -> float:
        return self._base_s + num_bytes * self._s_per_byte

    def learn(self, num_bytes: int, measured_s: float) -> None:
        """Take in one finished transfer. Without bytes or time it says nothing."""
        if num_bytes <= 0 or measured_s <= 0:
            return
        self.num_transfers += 1
        weight = max(1 / self.num_transfers, NEWEST_WEIGHT)
        wire_s, base_s = num_bytes * self._s_per_byte, self._base_s
        correction_s = weight * (measured_s - wire_s - base_s) / (wire_s**2 + base_s**2)
        self._s_per_byte = max(wire_s + correction_s * wire_s**2, wire_s * LEAST_LEFT) / num_bytes
        self._base_s = max(base_s + correction_s * base_s**2, base_s * LEAST_LEFT)


class LinkEstimates:
    """All links of one node, by the other side's host and protocol, so that a worker that restarts is known already.

    Owned by the `kv` thread; `reports` and `totals` are replaced, never changed, so any thread may read them.
    """

    def __init__(self, *, own_host_id: str, gbps: float = 0.0) -> None:
        self._own_host_id = own_host_id
        self._gbps = gbps
        self._links: dict[tuple[str, str], LinkEstimate] = {}
        self._usual_bytes = 0.0
        self.totals: dict[str, float] = dict.fromkeys(
            ("link_transfers", "link_predicted_s", "link_measured_s", "link_error_s"), 0.0
        )
        self.reports: tuple[LinkReport, ...] = ()
        self._report()

    def predict_s(self, host_id: str, protocol: str, num_bytes: float) -> float:
        return self._link(host_id, protocol).predict_s(num_bytes)

    def finished(self, host_id: str, protocol: str, num_bytes: int, measured_s: float) -> None:
        """A transfer was handed over: count prediction against measurement, then learn from it."""
        if num_bytes <= 0 or measured_s <= 0:
            return
        link = self._link(host_id, protocol)
        predicted_s = link.predict_s(num_bytes)
        added = {
            "link_transfers": 1.0,
            "link_predicted_s": predicted_s,
            "link_measured_s": measured_s,
            "link_error_s": abs(predicted_s - measured_s),
        }
        self.totals = {name: total + added[name] for name, total in self.totals.items()}
        link.learn(num_bytes, measured_s)
        weight = max(1 / self.totals["link_transfers"], NEWEST_WEIGHT)
        self._usual_bytes += weight * (num_bytes - self._usual_bytes)
        self._report()

    def _link(self, host_id: str, protocol: str) -> LinkEstimate:
        key = (host_id, protocol)
        found = self._links.get(key)
        if found is None:
            if len(self._links) >= MAX_LINKS:
                self._links.pop(next(iter(self._links)))
            kind = kind_of(protocol, is_same_host=host_id == self._own_host_id)
            found = self._links[key] = LinkEstimate(table_figures(kind, self._gbps))
        return found

    def _report(self) -> None:
        unmet = LinkEstimate(table_figures("ethernet", self._gbps))
        rows = [("", "ethernet", unmet), *((host, protocol, link) for (host, protocol), link in self._links.items())]
        self.reports = tuple(
            LinkReport(
                host_id,
                protocol,
                link.figures.base_s,
                link.figures.bytes_per_s,
                link.num_transfers,
                link.predict_s(self._usual_bytes),
            )
            for host_id, protocol, link in rows
        )
