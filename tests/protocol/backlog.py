"""Many requests at once, few faults: is the queue worked off, are messages few, are tenants served fairly?"""

from __future__ import annotations

from tests.protocol.gateway import Client
from tests.protocol.storm import Storm


class Backlog(Storm):
    """500 requests at once (or three tenants that ask for more than there is); no fault but a lost or late message."""

    FAULTS, SETTLE, hands, lanes, blocks, prefill_time = 100.0, 60.0, 4, 2, 90, (0.1, 0.17)
    room, tenants, weights_of, broker_lost_at = 1000, None, {}, 999

    def prepare(self):
        self.exact, self.p_loss, self.p_hedge, self.room_size, self.evicting = True, 0, 0, self.room, True
        self.can_fail_over = False
        self.p_msg = self.p_late = self.rng.choice([0, 0.02])
        self.only_outages, self.weights, self.chance = (
            True,
            dict(self.weights_of),
            lambda p: self.rng.random() < p and self.now < 30,
        )
        for name in ("p0", "p1", "p2", "p3"):
            self.start(name, "both")
        self.start("g0", "gateway"), self.start("g1", "gateway")
        times = (
            [(0, None)] * 500
            if not self.tenants
            else [(i / rate, t) for t, rate in self.tenants.items() for i in range(int(20 * rate))]
        )
        for i, (at, tenant) in enumerate(times):
            self.at(at + self.rng.uniform(0, 0.5), self.ask, f"r{i}", tenant)
        self.at(self.broker_lost_at, self.queue.clear)
        if self.tenants:
            self.at(20, self.check_fair)

    def ask(self, rid, tenant):
        self.seeds[rid], self.lengths[rid] = self.rng.randrange(1 << 30), [self.rng.randint(1, 6)]
        client = self.clients[rid] = Client(self, rid, 1)
        client.tenant, client.deadline = tenant or client.tenant, self.now + 600
        client.connect()

    def check_fair(self):
        share = {t: self.stats[f"claimed of tenant {t}"] / self.weights.get(t, 1) for t in self.tenants}
        self.samples["fairness, least over most"].append(min(share.values()) / max(share.values()))
        if min(share.values()) < 0.8 * max(share.values()):
            self.fail("UNFAIR", str(share))

    def play(self):
        while any(c.end is None for c in self.clients.values()) or len(self.clients) == 0 or self.now < 21:
            self.run(self.now + 0.25)
            self.check_idle()
            if self.now > self.FAULTS:
                self.fail("NO_END_IN_TIME", str([c.rid for c in self.clients.values() if c.end is None][:9]))
        wasted, n = self.stats["wake-ups doubled"] + self.stats["wake-ups swallowed"], len(self.clients)
        self.samples[f"wasted wake-ups per request, p_msg {self.p_msg}"].append(wasted / n)
        self.samples[f"repeated wake-ups per request, p_msg {self.p_msg}"].append(self.stats["wake-ups repeated"] / n)
        self.samples["backlog done after, s"].append(self.now)
        return self.stats


THREE = {"room": 4, "tenants": {"a": 40, "b": 20, "c": 10}}  # room 4: two batches of two lanes for each worker
_SETTINGS = {
    "backlog": {},
    "backloglost": {"broker_lost_at": 5},
    "backlogroom": {"room": 4},
    "fair": THREE,
    "fairweights": {**THREE, "weights_of": {"a": 1, "b": 2, "c": 1}},
    "fairnoroom": {**THREE, "room": 1000},
}
KINDS = {"storm": Storm, **{name: type(name, (Backlog,), settings) for name, settings in _SETTINGS.items()}}
