"""A worker's end of the KV channel in a storm: grants, one-sided writes, COMMIT, ABORT, FENCE."""

from __future__ import annotations

from tests.protocol.blocks import Grant, Job, Push
from tests.protocol.kernel import GRANT_LEASE, SEQ_BLOCKS


class KVLink:
    """Sends and receives KV for one worker. Owned by it; messages for `on_<kind>` come through `Storm.send`."""

    def __init__(self, worker):
        self.worker, self.sim = worker, worker.sim
        self.grants, self.results, self.pushes = {}, {}, {}

    def engine_died(self):
        """The memory of every grant is gone with the engine: late writes fail, the writers are told."""
        for g in self.grants.values():
            self.results[g.id] = ("REFUSED", g.writer, g.xfer)
            self.sim.send(self.worker, g.writer, "REFUSED", g.xfer)
        self.grants = {}

    # -- sending KV
    def push(self, job, peer):
        push = Push(self.worker.mint(), peer)
        self.pushes[push.xfer] = push
        job.pushes.append(push)
        for _ in range(3):
            self.sim.send(self.worker, peer, "RESERVE", push.xfer, job.rid, job.epoch, job.token, self.worker)
            yield 0.15
            if push.grant or push.result or push.closed:
                break
        if push.grant is None:
            push.closed = True  # a late GRANT of this xfer is never used
            return
        for i in range(SEQ_BLOCKS):
            yield self.sim.rng.uniform(0.005, 0.06)
            if push.closed:
                break
            self.write(push, job, i)
        while push.inflight and not self.sim.mutated("commit_early"):
            yield 0.01
        give_up = self.sim.now + 3.0
        while not push.closed and push.result is None and self.sim.now < give_up:
            self.sim.send(self.worker, peer, "COMMIT", push.grant, tuple(map(tuple, job.out)))
            yield 0.2
        push.closed = True
        if push.result == "HANDED" and not job.dead:
            return self.worker.drop(job)
        if push.result is None:
            while push.inflight:
                yield 0.01
            self.sim.send(self.worker, peer, "ABORT", push.grant)

    def write(self, push, job, i):
        """Posts a one-sided write: it lands later, whatever this process does, unless lost or the receiver is gone."""
        content, peer = self.worker.pool.content[job.blocks[i]] if job.blocks else None, push.peer
        push.inflight += 1

        def land():
            push.inflight -= 1
            pool, blocks = push.dst
            if (
                peer.alive and pool is peer.pool and not self.sim.chance(self.sim.p_loss)
            ):  # else: memory of an engine that is gone
                pool.land(blocks[i], push.grant, content)

        self.sim.at(self.sim.rng.uniform(0.001, 0.04) + (0.5 if self.sim.chance(0.05) else 0), land)

    def on_grant(self, xfer, gid, dst):
        push = self.pushes.get(xfer)
        if push and push.grant is None and (not push.closed or self.sim.mutated("fence_forgotten")):
            push.grant, push.dst = gid, dst
            if push.closed:
                push.closed = False

    def on_refused(self, xfer):
        if xfer in self.pushes:
            self.pushes[xfer].result = "REFUSED"

    def on_handed(self, xfer):
        if xfer in self.pushes:
            self.pushes[xfer].result = "HANDED"

    def on_fence(self, xfer, gid, peer):
        push = self.pushes.setdefault(xfer, Push(xfer, peer))
        if not self.sim.mutated("fence_forgotten"):
            push.closed = True  # remembered also if the GRANT is still on its way
        self.worker.spawn(self.answer_fence(push, gid, peer))

    def answer_fence(self, push, gid, peer):
        while push.inflight:
            yield 0.01
        self.sim.send(self.worker, peer, "FENCED", gid)

    # -- receiving KV
    def on_reserve(self, xfer, rid, epoch, tok, writer):
        for g in self.grants.values():
            if g.xfer == xfer and g.state == "LEASED":
                self.sim.send(self.worker, writer, "GRANT", xfer, g.id, (self.worker.pool, g.blocks))
                return
        gid = self.worker.mint()
        closed = self.worker.draining or self.worker.alone or self.sim.now < self.worker.engine_up_at
        blocks = None if closed else self.worker.pool.take(SEQ_BLOCKS, gid, "LEASED")
        if blocks is None:
            self.sim.send(self.worker, writer, "REFUSED", xfer)
            return
        self.grants[gid] = Grant(gid, xfer, writer, rid, epoch, tok, blocks, self.sim.now + GRANT_LEASE)
        self.sim.send(self.worker, writer, "GRANT", xfer, gid, (self.worker.pool, blocks))

    def close_grant(self, g, result=None):
        self.worker.pool.move(g.blocks, g.id, None, "FREE")
        del self.grants[g.id]
        if result:
            self.results[g.id] = (result, g.writer, g.xfer)
            self.sim.send(self.worker, g.writer, result, g.xfer)

    def on_commit(self, gid, out):
        g = self.grants.get(gid)
        if g is None:
            if gid in self.results:
                result, writer, xfer = self.results[gid]
                self.sim.send(self.worker, writer, result, xfer)
        elif g.state == "QUARANTINED":
            self.close_grant(g, "REFUSED")  # a COMMIT is the promise to write no more
        elif g.state == "LEASED":
            good = all(self.worker.pool.content[b] == (g.rid, i) for i, b in enumerate(g.blocks))
            if not good and not self.sim.mutated("no_checksum"):
                self.close_grant(g, "REFUSED")
                return
            g.state = "COMMITTED"
            self.worker.pool.move(g.blocks, g.id, g.id, "COMMITTED")
            self.worker.spawn(self.adopt(g, out))

    def adopt(self, g, out):
        new, sent = self.worker.mint(), self.sim.now
        while True:
            sent = self.sim.now
            reply = yield ("handoff", g.rid, g.epoch, g.token, new)
            if reply is not None:
                break
            yield 0.1
        job = Job(g.rid, new, sent)
        if g.id not in self.grants:  # the engine died meanwhile, the KV with it
            job.epoch, job.dead = reply[1] if reply[0] == "OK" else 0, True
            return (yield from self.worker.give_back(job)) if reply[0] == "OK" else None
        if reply[0] != "OK":
            return self.close_grant(g, "REFUSED")
        if g.rid in self.worker.jobs:
            self.worker.drop(self.worker.jobs[g.rid])
        self.worker.jobs[g.rid] = job
        job.epoch, job.cursor, job.fin_sent = reply[1:]
        job.out, job.state, job.seed, job.blocks = [list(x) for x in out], "DECODING", self.sim.seeds[g.rid], g.blocks
        self.worker.pool.move(g.blocks, g.id, new, "COMMITTED")
        del self.grants[g.id]
        self.results[g.id] = ("HANDED", g.writer, g.xfer)
        self.sim.send(self.worker, g.writer, "HANDED", g.xfer)
        job.stepping = True
        if self.worker.draining:
            self.worker.spawn(self.worker.push_or_release(job))

    def on_abort(self, gid):
        g = self.grants.get(gid)
        if g and g.state in ("LEASED", "QUARANTINED"):
            self.close_grant(g)

    on_fenced = on_abort

    def grant_keeper(self):
        while True:
            yield 0.1
            for g in list(self.grants.values()):
                if g.state == "COMMITTED":
                    continue
                if g.writer.channel_dead:  # proof, not a timeout
                    self.close_grant(g)
                elif g.state == "LEASED" and self.sim.now > g.expires:
                    if self.sim.mutated("free_on_timeout"):
                        self.close_grant(g)
                        continue
                    g.state = "QUARANTINED"
                    self.sim.stats["quarantined"] += 1
                    self.worker.pool.move(g.blocks, g.id, g.id, "QUARANTINED")
                if g.state == "QUARANTINED" and self.sim.now > g.fence_at:
                    g.fence_at = self.sim.now + 0.5
                    self.sim.send(self.worker, g.writer, "FENCE", g.xfer, g.id, self.worker)
