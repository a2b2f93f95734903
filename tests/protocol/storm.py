"""A storm: workers, gateways, clients, channels that lose and double, faults; then quiet, and nothing may be left."""

from __future__ import annotations

from collections import deque

from tests.protocol.gateway import Client, Gateway
from tests.protocol.kernel import EVICT_SHARE, IDLE_LIMIT, ROOMS, Process, Sim
from tests.protocol.memory_redis import MemoryRedis
from tests.protocol.worker import Worker


class Storm(Sim):
    FAULTS, SETTLE = 6.0, 30.0
    hands, lanes, blocks, prefill_time = 4, 4, 12, (0.02, 0.15)

    def __init__(self, seed, mutate=None, trace=False, make_redis=MemoryRedis):
        super().__init__(seed, mutate, trace)
        rng = self.rng
        self.exact, self.p_loss, self.p_msg = rng.random() < 0.7, rng.choice([0, 0.01, 0.05]), rng.choice([0, 0.1, 0.3])
        self.redis, self.seeds, self.lengths, self.poison, self.clients = make_redis(self), {}, {}, set(), {}
        self.worker_faults, self.lives, self.procs, self.queue = 0, 0, {}, deque()
        self.weights, self.idle_since, self.killed = {}, {}, {}
        self.p_hedge, self.p_late = 0.4, 0.1
        self.room_size, self.evicting = rng.choice(ROOMS), rng.random() < EVICT_SHARE
        self.prepare()

    def prepare(self):
        rng = self.rng
        for i in range(rng.randint(1, 2)):
            self.start(f"p{i}", "prefill")
        for i in range(rng.randint(2, 3)):
            self.start(f"d{i}", rng.choice(["decode", "decode", "both"]))
        for i in range(2):
            self.start(f"g{i}", "gateway")
        for i in range(rng.randint(2, 6)):
            self.at(rng.uniform(0, self.FAULTS - 1), self.arrival, f"r{i}")
        kinds = rng.sample(
            ["kill", "engine", "pause", "cut", "drain", "killgw", "failover", "outage", "flush", "broker", "scramble"],
            rng.randint(1, 6),
        )
        if "flush" in kinds and rng.random() < 0.7:
            kinds.remove("flush")
        kinds = rng.choice(
            [kinds, kinds, kinds, ["outage"], ["outage", "failover"], ["failover", "kill", "killgw"], ["pause", "cut"]]
        )
        self.can_fail_over = "failover" in kinds
        self.only_outages = set(kinds) <= {"outage", "drain", "killgw", "broker", "scramble"}
        for _ in range(rng.randint(0, 8)):
            if kinds:
                self.at(rng.uniform(0.2, self.FAULTS), self.fault, rng.choice(kinds))

    # -- who is there
    def incarnation(self, name):
        self.lives += 1
        return f"{name}.{self.lives}"

    def alive(self, incarnation):
        return any(p.alive and p.incarnation == incarnation for p, _ in self.procs.values())

    def start(self, name, role):
        proc = Gateway(self, name) if role == "gateway" else Worker(self, name, role)
        proc.channel_dead = False
        self.procs[name] = (proc, role)

    def workers(self):
        return [p for p, role in self.procs.values() if role != "gateway" and p.alive]

    def gateways(self):
        return [p for p, role in self.procs.values() if role == "gateway" and p.alive]

    def arrival(self, rid):
        k = self.rng.choice([1, 1, 1, 3])
        self.seeds[rid], self.lengths[rid] = (
            self.rng.randrange(1 << 30),
            [self.rng.randint(1, self.rng.choice([14, 14, 120])) for _ in range(k)],
        )
        if self.rng.random() < 0.05:
            self.poison.add(rid)
            self.worker_faults, self.only_outages = self.worker_faults + 1, False
        client = Client(self, rid, k)
        self.clients[rid] = client
        client.connect()
        if self.rng.random() < 0.2:
            self.at(self.rng.uniform(0, 2), client.cancel)

    # -- channels: Celery, feed, peer to peer
    def wake_all(self, wakes, hedge=False):
        for rid, n in wakes:
            task_id = f"{rid}.{'hedge' if hedge else 'prefill'}" + ("" if self.mutated("reused_task_id") else f".{n}")
            for _ in range(0 if self.chance(self.p_msg) else 2 if self.chance(self.p_msg) else 1):
                self.at(
                    self.rng.uniform(0.001, 0.02) + (self.rng.uniform(0, 4) if self.chance(self.p_late) else 0),
                    self.queue_up,
                    (task_id, rid, hedge),
                )

    def queue_up(self, message):
        self.queue.append(message)
        self.pump()

    def pump(self):
        """The broker: whoever has a hand free takes the next message."""
        while self.queue and (
            free := [
                w
                for w in self.workers()
                if w.hands < self.hands and not w.draining and not w.alone and self.now >= w.engine_up_at
            ]
        ):
            worker = self.rng.choice([w for w in free if (w.role == "prefill") != (self.rng.random() < 0.25)] or free)
            worker.hands += 1
            self.deliver_to(worker, self.queue.popleft())

    def deliver_to(self, worker, message):
        if not worker.alive:
            self.at(self.rng.uniform(2, 5), self.queue_up, message)  # unacked: the broker gives it to another
        elif self.now < worker.paused_until:
            self.at(worker.paused_until - self.now, self.deliver_to, worker, message)
        else:
            worker.on_wakeup(message)

    def revoke(self, rid, n):
        for worker in self.workers():
            if not self.chance(self.p_msg):
                worker.memory.update(
                    f"{rid}.{stage}" + ("" if self.mutated("reused_task_id") else f".{n}")
                    for stage in ("prefill", "hedge")
                )

    def room_limit(self):
        """What the caller believes: so many places per live worker, at least one."""
        return max(1, int(self.room_size * len(self.workers()) * (self.rng.choice([0.5, 1, 1, 1]))))

    def feed(self, gateway, rid, c, index, ids, prefix_hash):
        """A hint for a gateway; `c` None: something has ended, read the log."""
        if not self.chance(self.p_msg) and gateway.alive:
            self.at(0.002, lambda: [box.append((c, index, ids, prefix_hash)) for box in gateway.inbox.get(rid, ())])

    def send(self, src, dst, kind, *args):
        def arrive():
            if not dst.alive:
                return
            if self.now < dst.paused_until:
                self.at(dst.paused_until - self.now, arrive)
                return
            self.log(src.incarnation, "->", dst.incarnation, kind, args[:2])
            getattr(dst.kv, f"on_{kind.lower()}")(*args)

        for _ in range(0 if self.chance(self.p_msg) else 2 if self.chance(self.p_msg) else 1):
            self.at(self.rng.uniform(0.001, 0.01) + (self.rng.uniform(0, 1.5) if self.chance(0.1) else 0), arrive)

    # -- faults
    def crash(self, proc):
        if not proc.alive:
            return
        self.log("CRASH", proc.incarnation)
        role, supervised = self.procs[proc.name][1], self.evicting and self.rng.random() < EVICT_SHARE
        proc.alive = False
        self.note_kill(proc, supervised)
        if supervised and role != "gateway":
            self.supervise(proc.incarnation)
        self.at(0.6, setattr, proc, "channel_dead", True)  # EOF comes after everything that was in flight
        self.at(self.rng.uniform(0.3, 2.0), self.start, proc.name, role)
        for client in self.clients.values():
            if client.gateway is proc:
                self.at(self.rng.uniform(0.05, 0.5), client.connect)

    def engine_dies(self, worker):
        if worker.alive:
            self.log("ENGINE DIES", worker.incarnation)
            self.note_kill(worker, self.evicting)
            worker.engine_dies()

    def note_kill(self, proc, supervised):
        for rec in self.redis.all():
            if any(t.startswith(proc.incarnation + ".") for t in rec.owners):
                self.killed[rec.rid] = self.now, "kill to claim, evict" if supervised else "kill to claim, lease"

    def claimed(self, rec):
        self.stats[f"claimed of tenant {rec.tenant}"] += 1
        if rec.rid in self.killed:
            at, kind = self.killed.pop(rec.rid)
            self.samples[kind].append(self.now - at)

    def supervise(self, incarnation):
        """The parent's waitpid; it may die itself before Redis has answered."""
        supervisor = Process(self, "s")
        supervisor.spawn(self.evict(supervisor, incarnation))
        if self.chance(0.1):
            self.at(self.rng.uniform(0, 0.1), setattr, supervisor, "alive", False)

    def evict(self, process, incarnation):
        yield self.rng.uniform(0.005, 0.05)
        reply = yield from process.until_reply("evict", incarnation, self.room_limit())
        self.wake_all(reply[1])

    def fault(self, kind):
        rng = self.rng
        self.log("FAULT", kind)
        self.stats["fault " + kind] += 1
        if kind == "failover":
            self.redis.failover(rng.randint(1, 60), rng.choice([0, 0.3, 1, 3]))
        elif kind == "outage":
            self.redis.down_until = self.now + rng.uniform(0.5, 4)
        elif kind == "flush":
            self.redis.flushall()
        elif kind == "broker":
            self.queue.clear()
        elif kind == "scramble":
            self.redis.scramble()
        elif kind == "killgw" and self.gateways():
            self.crash(rng.choice(self.gateways()))
        elif kind != "killgw" and self.workers():
            worker = rng.choice(self.workers())
            if kind == "drain":
                worker.spawn(worker.drain())
                return
            self.worker_faults += 1
            if kind == "kill":
                self.crash(worker)
            elif kind == "engine":
                self.engine_dies(worker)
            elif kind == "pause":
                worker.paused_until = self.now + rng.uniform(0.3, 5)
                if self.mutated("evict_unproven"):
                    self.supervise(worker.incarnation)
            else:
                worker.cut_until = self.now + rng.uniform(0.3, 5)

    # -- verdict
    def settled(self):
        return (
            all(c.end is not None for c in self.clients.values())
            and not any(w.jobs or w.kv.grants for w in self.workers())
            and not self.redis.room.dispatched
            and not any(self.redis.room.waiting.values())
            and all(s == "FREE" for w in self.workers() for s in w.pool.state)
        )

    def play(self):
        self.run(self.FAULTS)
        self.faulty = False
        while not self.settled():
            room = self.redis.room
            if self.now > self.FAULTS + self.SETTLE:
                waiting = [
                    (c.rid, (r := self.redis.find(c.rid)) and (r.state, r.epoch, r.owners))
                    for c in self.clients.values()
                    if c.end is None
                ]
                if waiting:
                    self.fail("NO_END_IN_TIME", str(waiting))
                if room.dispatched or any(room.waiting.values()):
                    self.fail("ROOM_DRIFT", str((room.dispatched, room.waiting)))
                self.fail(
                    "LEAK",
                    str(
                        [
                            (w.incarnation, list(w.jobs), [g.state for g in w.kv.grants.values()], w.pool.holder)
                            for w in self.workers()
                        ]
                    ),
                )
            self.run(self.now + 0.25)
            self.check_idle()
        self.stats["settled after faults, s"] = round(self.now - self.FAULTS, 2)
        return self.stats

    def check_idle(self):
        """No request waits long while a worker that could take it has nothing in hand."""
        queued = any(r.state == "QUEUED" for r in self.redis.all()) and not self.queue
        idle = [
            w
            for w in self.workers()
            if queued
            and not w.jobs
            and not w.hands
            and not w.draining
            and self.now >= w.engine_up_at
            and self.now >= max(w.paused_until, w.cut_until, self.redis.down_until)
        ]
        self.idle_since = {w: self.idle_since.get(w, self.now) for w in idle}
        if idle and self.now - min(self.idle_since.values()) > IDLE_LIMIT:
            self.fail(
                "IDLE_WHILE_WAITING",
                str([(r.rid, r.state, r.wakes, r.wake_at) for r in self.redis.all() if r.state == "QUEUED"]),
            )
        if idle:
            self.stats["longest idle while waiting, s"] = max(
                self.stats["longest idle while waiting, s"], self.now - min(self.idle_since.values())
            )
