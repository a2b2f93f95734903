"""A gateway and a client in a storm. The client checks what a user would notice: gaps, repeats, two ends."""

from __future__ import annotations

from kvstore.state.hashing import hash_of
from tests.protocol.kernel import FINAL, IDLE_HINT, REAP, Process, token


class Gateway(Process):
    def __init__(self, sim, name):
        super().__init__(sim, name)
        self.inbox = {}
        self.spawn(self.reaper())

    def reaper(self):
        busy_at = self.sim.now
        while True:
            yield REAP * self.sim.rng.uniform(0.8, 1.2)
            if self.sim.queue or not any(w.hands < self.sim.hands for w in self.sim.workers()):
                busy_at = self.sim.now  # what it sees: broker queue length, free hands in the heartbeats
            reply = yield ("reap", self.sim.room_limit(), self.sim.now - busy_at > IDLE_HINT)
            self.sim.wake_all(reply[1] if reply else ())

    def stream(self, client, connection):
        """Serves one connection: accept (or find) the record, read the logs from its position, follow the feed."""
        sim, rid = self.sim, client.rid
        counts, want_hash = [len(x) for x in client.got], [hash_of(x) for x in client.got]
        have, inbox = None, []  # have: ids per choice, once the position is verified
        self.inbox.setdefault(rid, []).append(inbox)
        yield from self.open(client)
        silent_since, read_log = -9.0, True
        while True:
            while inbox and have is not None:
                c, index, ids, prefix_hash = inbox.pop(0)
                if c is None:
                    read_log = True
                elif sim.mutated("gateway_no_dedup"):
                    have[c] += ids
                    client.receive(connection, self, c, index, ids)
                elif index > len(have[c]):
                    read_log = True
                elif not self.continues(have[c], index, ids, prefix_hash):
                    read_log = True  # another version: the log decides
                elif fresh := ids[len(have[c]) - index :]:
                    client.receive(connection, self, c, len(have[c]), fresh)
                    have[c] += fresh
                silent_since = sim.now
            if not read_log and (sim.now - silent_since < 1.0 or sim.mutated("gateway_trusts_feed")):
                yield 0.03
                continue
            reply = yield ("attach", rid, self)
            read_log, silent_since = reply is None, sim.now
            if reply is None:
                yield 0.1
                continue
            if reply[0] == "GONE":
                if sim.mutated("no_reaccept"):
                    continue
                yield from self.open(client)
                read_log = True
                continue
            _, state, logs, _ = reply
            if have is None:
                if any(len(log) < n for log, n in zip(logs, counts, strict=True)):  # Redis lost what the client has
                    if state in FINAL:
                        return client.receive_end(connection, self, state if state != "FINISHED" else "DIVERGED")
                    continue
                if any(
                    hash_of(log[:n]) != h for log, n, h in zip(logs, counts, want_hash, strict=True)
                ) and not sim.mutated("no_resume_hash"):
                    return client.receive_end(connection, self, "DIVERGED")
                have = [log[:n] for log, n in zip(logs, counts, strict=True)]
            for c, log in enumerate(logs):
                if len(log) < len(have[c]) and state not in FINAL and not sim.mutated("no_refill"):
                    if log == have[c][: len(log)]:
                        yield from self.until_reply("refill", rid, c, len(log), have[c][len(log) :], hash_of(log))
                    read_log = True
                if log[: len(have[c])] != have[c][: len(log)]:
                    return client.receive_end(connection, self, "DIVERGED")
                if len(log) > len(have[c]):
                    client.receive(connection, self, c, len(have[c]), log[len(have[c]) :])
                    have[c] = log
            if state in FINAL:
                return client.receive_end(connection, self, state)

    def continues(self, have, index, ids, prefix_hash):
        """Does a feed entry agree with what was sent: the ids before it, and the ids it repeats?"""
        repeated = min(len(have) - index, len(ids))
        same = hash_of(have[:index]) == prefix_hash and have[index : index + repeated] == list(ids[:repeated])
        return same or self.sim.mutated("feed_no_hash")

    def open(self, client):
        reply = yield from self.until_reply(
            "accept",
            client.rid,
            client.seed,
            client.deadline,
            len(client.got),
            self,
            client.tenant,
            client.priority,
            self.sim.room_limit(),
        )
        self.sim.wake_all(reply[1])
        if reply[0] == "DISPATCH" and self.sim.rng.random() < self.sim.p_hedge:
            yield self.sim.rng.uniform(0.02, 0.3)
            self.sim.wake_all([turn for turn in reply[1] if turn[0] == client.rid], hedge=True)

    def settle(self, rid):
        """The client has its end: a failover may have lost it, so look again until it is surely kept."""
        for wait in (1, 1, 2):
            yield wait
            yield from self.cancel_once(rid)

    def cancel_once(self, rid):
        reply = yield from self.until_reply("cancel", rid, self.sim.room_limit())
        if reply[0] == "OK":
            self.sim.revoke(rid, reply[1])
            self.sim.wake_all(reply[2])

    def cancel(self, rid, done):
        yield from self.cancel_once(rid)
        done.append(True)
        if not self.sim.mutated("finish_unsettled"):
            yield from self.settle(rid)


class Client:
    def __init__(self, sim, rid, k):
        self.sim, self.rid, self.seed = sim, rid, sim.seeds[rid]
        self.deadline = sim.now + sim.rng.choice([3, 60, 60, 60])
        self.got, self.end, self.connection, self.gateway = [[] for _ in range(k)], None, 0, None
        self.tenant, self.priority = sim.rng.choice("abc"), sim.rng.choice([0, 0, 1])

    def connect(self):
        gateways = self.sim.gateways()
        if self.end is not None:
            return
        if not gateways:
            self.sim.at(0.2, self.connect)
            return
        self.connection += 1
        self.gateway = self.sim.rng.choice(gateways)
        self.gateway.spawn(self.gateway.stream(self, self.connection))

    def receive(self, connection, gateway, c, index, ids):
        self.sim.at(0.003, self.arrive, connection, gateway, c, index, tuple(ids))

    def arrive(self, connection, gateway, c, index, ids):
        if connection != self.connection or not gateway.alive:  # bytes of a dead connection are lost
            return
        if self.end is not None:
            self.sim.fail("TOKEN_AFTER_END", self.rid)
        for i, tok in enumerate(ids, index):
            got = self.got[c]
            if i != len(got):
                self.sim.fail("CLIENT_GAP_OR_REPEAT", f"{self.rid}/{c} index {i}, holds {len(got)}")
            if not any(tok == token(self.seed, c, i, hash_of(got), s) for s in ((0,) if self.sim.exact else range(4))):
                self.sim.fail("CLIENT_WRONG_TOKEN", f"{self.rid}/{c} index {i}")
            got.append(tok)

    def receive_end(self, connection, gateway, state):
        self.sim.at(0.003, self.arrive_end, connection, gateway, state)

    def arrive_end(self, connection, gateway, state):
        sim = self.sim
        if connection != self.connection or not gateway.alive:
            return
        if self.end is not None:
            sim.fail("TWO_TERMINAL_EVENTS", f"{self.rid} {self.end} then {state}")
        if state == "FINISHED" and [len(x) for x in self.got] != sim.lengths[self.rid]:
            sim.fail("FINISHED_INCOMPLETE", f"{self.rid} {[len(x) for x in self.got]} of {sim.lengths[self.rid]}")
        if state == "DIVERGED" and sim.exact:
            sim.fail("DIVERGED_THOUGH_EXACT", self.rid)
        if state == "FAILED" and self.rid not in sim.poison and not sim.worker_faults:
            sim.fail("FAILED_WITHOUT_CAUSE", f"{self.rid}: no worker died, paused or was cut off")
        self.end, self.end_at, self.end_gateway = state, sim.now, gateway
        if not sim.mutated("finish_unsettled"):
            gateway.spawn(gateway.settle(self.rid))
        sim.stats["end " + state] += 1

    def cancel(self, done=None):
        done = [] if done is None else done
        if not done and self.end is None:
            if self.sim.gateways():
                gateway = self.sim.rng.choice(self.sim.gateways())
                gateway.spawn(gateway.cancel(self.rid, done))
            self.sim.at(1.0, self.cancel, done)
