"""A worker in a storm: it claims, prefills, steps, publishes, renews, and gives back.

Its transfers of KV are in `kv_link.py`.
"""

from __future__ import annotations

from kvstore.state.hashing import hash_of
from tests.protocol.blocks import Job, Pool
from tests.protocol.kernel import (
    MAX_CRASHES,
    RENEW,
    SELF_FENCE,
    SEQ_BLOCKS,
    STEP_ON,
    STEP_UNTIL,
    WORK_AFTER_CLIENT_END,
    WORK_AFTER_END,
    Process,
    token,
)
from tests.protocol.kv_link import KVLink


class Worker(Process):
    def __init__(self, sim, name, role):
        super().__init__(sim, name)
        self.role, self.draining, self.salt = role, False, 0 if sim.exact else sim.rng.randrange(1, 4)
        self.pool, self.jobs, self.kv = Pool(sim, sim.blocks, name), {}, KVLink(self)
        self.engine_up_at, self.memory, self.hands, self.lanes, self.line, self.alone = 0.0, set(), 0, 0, [], None
        sim.at(0, sim.pump)
        for loop in (self.engine(), self.publisher(), self.renewer(), self.kv.grant_keeper()):
            self.spawn(loop)

    # -- a Celery wake-up
    def on_wakeup(self, message):
        task_id, rid, hedge = message
        if self.draining or self.sim.now < self.engine_up_at:
            self.hands -= 1
            self.sim.at(0.1, self.sim.queue_up, message)  # reject(requeue): the same message, nobody has finished it
        elif task_id in self.memory:  # Celery: finished or revoked before, acked in silence
            self.done(task_id, "wake-ups swallowed")
        elif rid not in self.jobs or self.sim.mutated("local_dup_claim"):  # else: adopt, the sequence is live here
            self.jobs[rid] = job = Job(rid, self.mint(), self.sim.now)
            self.spawn(self.task(job, task_id, hedge))
        else:
            self.done(task_id, "wake-ups doubled")

    def task(self, job, task_id, hedge):
        self.line.append(job)
        # The claim comes when the batch is formed.
        while self.lanes >= self.sim.lanes or self.line[0] is not job or self.alone:
            yield 0.02
        self.line.pop(0)
        self.lanes += 1
        yield from self.prefill(job, hedge)
        self.lanes -= 1
        self.done(task_id, "wake-ups claimed" if job.epoch else "wake-ups doubled")

    def done(self, task_id, what):
        self.hands -= 1
        self.memory.add(task_id)
        self.sim.stats[what] += 1
        self.sim.at(0, self.sim.pump)

    def prefill(self, job, hedge):
        if job.dead:
            return
        sent = self.sim.now
        reply = yield from self.until_reply("claim", job.rid, job.token, hedge, self.sim.room_limit())
        if reply[0] != "OK":
            return self.drop(job)
        _, job.epoch, job.seed, log, fin, turns, crashes = reply
        self.sim.wake_all(turns)
        if job.dead or (
            crashes >= MAX_CRASHES - 1 and self.alone
        ):  # the engine died meanwhile: what came late is given back
            return (yield from self.give_back(job))
        if crashes >= MAX_CRASHES - 1 and not self.sim.mutated("crashed_run_together"):
            self.alone = job  # the last try runs alone: a poison request fails, its neighbours do not
            while any(j.epoch and j is not job for j in self.jobs.values()) and not job.dead:
                yield 0.05
            if job.dead:
                return
        job.last_ok, job.out, job.cursor, job.fin_sent = sent, log, [len(x) for x in log], fin
        job.blocks = self.pool.take(SEQ_BLOCKS, job.token, "COMMITTED") or []
        if not job.blocks:
            return (yield from self.give_back(job))
        for _ in range(3):  # chunks of the prompt
            yield self.sim.rng.uniform(*self.sim.prefill_time)
            while not job.dead and self.suspended(job):
                yield 0.05
            if job.dead:
                return
            self.work(job)
        for i, b in enumerate(job.blocks):
            self.pool.content[b] = (job.rid, i)
        self.sample(job)  # the first token, published before the handoff
        if not self.complete(job):
            if self.role == "prefill":
                return (yield from self.push_or_release(job))
            new, job.promoting = self.mint(), True  # local prefill: hand off to ourselves
            reply = yield from self.until_reply("handoff", job.rid, job.epoch, job.token, new)
            if job.dead:
                if reply[0] == "OK":
                    if self.sim.only_outages:
                        self.sim.fail(
                            "TAKEOVER_WITHOUT_CAUSE", f"{job.rid}: {self.incarnation} dropped its own live sequence"
                        )
                    job.epoch, job.token = reply[1], new
                    yield from self.give_back(job)
                return
            if reply[0] != "OK":
                return self.drop(job)
            self.pool.move(job.blocks, job.token, new, "COMMITTED")
            job.epoch, job.token, job.state, job.stepping, job.promoting = reply[1], new, "DECODING", True, False

    # -- engine, output, leases
    def suspended(self, job):
        return self.sim.now - job.last_ok > SELF_FENCE and not self.sim.mutated("no_self_fence")

    def work(self, job):
        sim, rec = self.sim, self.sim.redis.find(job.rid)
        ended = rec.final_at if rec else sim.redis.gone_at.get(job.rid)
        if ended is not None and sim.now - ended > WORK_AFTER_END:
            sim.fail("WORK_AFTER_END", f"{self.incarnation} still computes {job.rid}, ended at {ended:.2f}")
        if rec and rec.state == "DECODING" and len(rec.owners) != 1:
            sim.fail("TWO_OWNERS", f"{job.rid} {rec.owners}")
        client = sim.clients[job.rid]
        if client.end is not None and client.end_gateway.alive and sim.now - client.end_at > WORK_AFTER_CLIENT_END:
            sim.fail(
                "WORK_AFTER_CLIENT_END",
                f"{self.incarnation} {job.rid}: {client.end} at {client.end_at:.2f}, record {rec and rec.state}",
            )
        if rec is None or job.token in rec.owners or rec.epoch < job.epoch:
            job.unowned_since = None
        elif job.unowned_since is None:
            job.unowned_since = sim.now
        elif sim.now - max(job.unowned_since, job.last_ok) > WORK_AFTER_END:
            sim.fail(
                "WORK_WITHOUT_OWNERSHIP",
                f"{self.incarnation} {job.rid} epoch {job.epoch}, record {rec.state} {rec.epoch} {rec.owners}",
            )
        if job.rid in sim.poison and sim.rng.random() < 0.7:
            sim.at(0, sim.crash if sim.rng.random() < 0.5 else sim.engine_dies, self)

    def complete(self, job):
        return all(len(o) >= n for o, n in zip(job.out, self.sim.lengths[job.rid], strict=False))

    def sample(self, job):
        for c, ids in enumerate(job.out):
            if len(ids) < self.sim.lengths[job.rid][c]:
                ids.append(token(job.seed, c, len(ids), hash_of(ids), self.salt))

    def engine(self):
        while True:
            yield 0.05
            for job in list(self.jobs.values()):
                suspended = self.suspended(job)
                if not suspended:
                    self.sim.stats["steps while suspended, kept"] += job.ahead
                    job.ahead = 0
                # Suspended: so many into the buffer, none if the last OK is old: who was paused asks `renew` first.
                may_step = (
                    not suspended
                    or (job.ahead < STEP_ON and self.sim.now - job.last_ok < STEP_UNTIL)
                    or self.sim.mutated("step_on_for_ever")
                )
                if job.stepping and may_step and not self.complete(job):
                    job.ahead += suspended
                    for i, b in enumerate(job.blocks):
                        if self.pool.content[b] != (job.rid, i):
                            self.sim.fail(
                                "CORRUPT_KV_DECODED", f"{self.name}[{b}] for {job.rid} holds {self.pool.content[b]}"
                            )
                    self.work(job)
                    self.sample(job)

    def publisher(self):
        while True:
            yield 0.05
            todo, sent = [], self.sim.now
            for job in self.jobs.values():
                if job.epoch and not self.suspended(job):
                    for c, ids in enumerate(job.out):
                        fin, i = len(ids) >= self.sim.lengths[job.rid][c], job.cursor[c]
                        if not job.fin_sent[c] and (i < len(ids) or (fin and i == len(ids))):
                            todo.append(
                                (
                                    job,
                                    (
                                        job.rid,
                                        job.epoch,
                                        job.token,
                                        job.state,
                                        c,
                                        i,
                                        tuple(ids[i:]),
                                        hash_of(ids[:i]),
                                        fin,
                                    ),
                                )
                            )
            if not todo:
                continue
            replies = yield ("append_batch", [item for _, item in todo])
            for (job, item), reply in zip(todo, replies or (), strict=False):
                c, index, ids, fin = item[4], item[5], item[6], item[8]
                if job.dead or item[2] != job.token:
                    continue
                if reply is None or (reply[0] == "GAP" and self.sim.mutated("ignore_gap")):
                    job.cursor[c], job.fin_sent[c], job.last_ok = index + len(ids), fin, sent
                elif reply[0] in ("GAP", "DUP"):
                    job.cursor[c], job.last_ok = reply[1], sent
                elif reply[0] == "FORK":
                    self.sim.stats["forks refused"] += 1
                    self.spawn(self.give_back(job))
                else:
                    self.verdict(job, reply)
                if not job.dead and all(job.fin_sent):
                    self.drop(job)

    def renewer(self):
        while True:
            yield RENEW
            jobs, sent = [j for j in self.jobs.values() if j.epoch], self.sim.now
            if not jobs:
                continue
            tokens = [j.token for j in jobs]
            replies = yield ("renew", [(j.rid, j.epoch, j.token, j.state) for j in jobs])
            for job, tok, reply in zip(jobs, tokens, replies or (), strict=False):
                if reply is None:
                    job.last_ok = max(job.last_ok, sent)
                elif tok == job.token and not job.dead:
                    self.verdict(job, reply)
            if replies is None and self.sim.mutated("fence_drops_kv"):
                for job in jobs:
                    if self.suspended(job) and not job.dead:
                        self.drop(job)

    def verdict(self, job, reply):
        """STALE, FINAL or GONE. STALE may be our own handoff that overtook this call: then its reply decides."""
        if not (reply[0] == "STALE" and job.promoting) or self.sim.mutated("own_handoff_is_stale"):
            self.drop(job)

    def drop(self, job):
        job.dead = True
        if self.alone is job:
            self.alone = None
        self.sim.stats["steps while suspended, wasted"] += job.ahead
        if self.jobs.get(job.rid) is job:
            del self.jobs[job.rid]
        for push in job.pushes:
            push.closed = True
        self.spawn(self.free_when_quiet(job, self.pool, job.token))

    def engine_dies(self):
        """The engine alone is killed: its KV is gone; the front sees it, evicts itself, goes on under a new name."""
        old, self.incarnation, self.engine_up_at = (
            self.incarnation,
            self.sim.incarnation(self.name),
            self.sim.now + self.sim.rng.uniform(0.3, 2),
        )
        for job in list(self.jobs.values()):
            self.drop(job)
        self.kv.engine_died()
        self.pool = Pool(self.sim, self.sim.blocks, self.name)
        self.sim.at(self.engine_up_at - self.sim.now, self.sim.pump)
        if self.sim.evicting:
            self.spawn(self.sim.evict(self, old))

    def free_when_quiet(self, job, pool, tok):
        while any(p.inflight for p in job.pushes) and not self.sim.mutated("free_source_early"):
            yield 0.01
        for push in job.pushes:
            if push.grant and push.result is None:
                self.sim.send(self, push.peer, "ABORT", push.grant)
        if job.blocks:
            pool.move(job.blocks, tok, None, "FREE")
            job.blocks = []

    def give_back(self, job):
        """Voluntary release: back to QUEUED at once, no crash counted."""
        job.stepping = False
        reply = yield from self.until_reply("release", job.rid, job.epoch, job.token, self.sim.room_limit())
        if not job.dead:
            self.drop(job)
        if reply[0] == "OK":
            self.sim.wake_all(reply[2])

    def push_or_release(self, job):
        job.stepping = False
        for _ in range(3):
            peers = [w for w in self.sim.workers() if w.role != "prefill" and w is not self and not w.draining]
            if peers and not job.dead:
                yield from self.kv.push(job, self.sim.rng.choice(peers))
            if job.dead:
                return
        yield from self.give_back(job)

    def drain(self):
        self.draining = True
        for job in list(self.jobs.values()):
            if job.stepping:
                self.spawn(self.push_or_release(job))
        while self.jobs or self.kv.grants:
            yield 0.1
        self.sim.crash(self)  # ordered exit; a new incarnation starts
