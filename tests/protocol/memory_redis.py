"""The functions of the state server in memory: the rules themselves, in the fewest words, with switches to break each.

`real_redis.py` has the same methods on a real server. Replies are tuples, the first word as in the protocol.
"""

from __future__ import annotations

import copy

from kvstore.state.hashing import hash_of
from tests.protocol.kernel import (
    AUDIT,
    FINAL,
    LEASE,
    LOSS_WINDOW,
    MAX_CRASHES,
    MAX_QUEUE_TIME,
    REAP,
    REPLICAS,
    WAKE_RATE,
)


class Record:
    def __init__(self, rid, seed, deadline, k, gateway, now, tenant, priority):
        self.rid, self.seed, self.deadline, self.gateway, self.tenant, self.priority = (
            rid,
            seed,
            deadline,
            gateway,
            tenant,
            priority,
        )
        self.wake_n, self.woken_at, self.charged, self.patience = 0, now, False, 0.0
        self.state, self.epoch, self.owners, self.crashes, self.attempts = "QUEUED", 1, {}, 0, 0
        self.log, self.fin, self.wake_at, self.wakes, self.final_at = (
            [[] for _ in range(k)],
            [False] * k,
            now + 1.0,
            0,
            None,
        )

    def clone(self):
        other = copy.copy(self)
        other.owners, other.fin, other.log = dict(self.owners), list(self.fin), [list(x) for x in self.log]
        return other


class Room:
    """The waiting room of a shard. In flight (dispatched, not yet claimed) is a SET of rids: nothing can shift it."""

    def __init__(self):
        self.waiting, self.tenants, self.tags, self.virtual, self.dispatched, self.count, self.claims = (
            {},
            {},
            {},
            0.0,
            {},
            0,
            (),
        )

    def clone(self):
        other = copy.copy(self)
        other.waiting, other.tenants = {t: dict(q) for t, q in self.waiting.items()}, dict(self.tenants)
        other.tags, other.dispatched = dict(self.tags), dict(self.dispatched)
        return other


class MemoryRedis:
    def __init__(self, sim):
        self.sim, self.recs, self.undo, self.room, self.room_before, self.wake_budget = (
            sim,
            {},
            [],
            Room(),
            None,
            (0.0, 5.0),
        )
        self.down_until, self.last_reap, self.grace_until, self.gone_at = 0.0, 0.0, 0.0, {}

    def find(self, rid):
        """The record, for the invariants; None if there is none."""
        return self.recs.get(rid)

    def all(self):
        return list(self.recs.values())

    def failover(self, k, outage):
        """The new primary lacks the last k writes, none older than the loss window."""
        while k and self.undo and self.undo[-1][0] > self.sim.now - LOSS_WINDOW:
            _, rid, old, room = self.undo.pop()
            self.recs.pop(rid, None)
            self.room, self.room_before = room.clone(), None
            if old is None:
                self.gone_at[rid] = self.sim.now
            else:
                self.recs[rid] = old
            k -= 1
        self.undo.clear()
        self.down_until = self.sim.now + outage

    def flushall(self):
        self.gone_at.update(dict.fromkeys(self.recs, self.sim.now))
        self.recs.clear(), self.undo.clear()
        self.room, self.room_before = Room(), None

    def scramble(self):
        """The room is damaged (a DEL by hand, a bug): places held for nobody, members lost."""
        rng, room, self.room_before = self.sim.rng, self.room, None
        room.dispatched.update((f"phantom{i}", self.sim.now) for i in range(rng.choice([0, 1, 5, 20])))
        for members in (room.dispatched, room.tenants, *room.waiting.values()):
            for m in list(members):
                if rng.random() < 0.3:
                    del members[m]

    def _write(self, rid):
        rec = self.recs.get(rid)
        self.room_before = self.room_before or self.room.clone()
        self.undo.append((self.sim.now, rid, rec and rec.clone(), self.room_before))
        del self.undo[:-80]
        return rec

    # -- the waiting room: who is QUEUED is in `waiting` or in `dispatched`
    def _enter(self, rec):
        room, self.room_before = self.room, None
        queue = room.waiting.setdefault(rec.tenant, {})
        room.tenants.setdefault(rec.tenant, max(room.virtual, room.tags.get(rec.tenant, 0)))
        queue[rec.rid] = (not rec.charged, rec.priority, rec.deadline)  # what was served before goes first
        rec.wake_at, rec.wakes = self.sim.now + AUDIT, 0

    def _leave(self, rec):
        room, self.room_before = self.room, None
        if room.dispatched.pop(rec.rid, None) is not None:
            room.count -= 1
        room.waiting.get(rec.tenant, {}).pop(rec.rid, None)

    def _wake(self, rec):
        """One more wake-up. Its number follows the clock: never used again, even if a failover or FLUSHALL loses it."""
        rec.wake_n = (
            rec.wake_n + 1 if self.sim.mutated("wake_counter") else max(rec.wake_n + 1, int(self.sim.now * 1000))
        )
        rec.woken_at, rec.wake_at, rec.wakes = self.sim.now, self.sim.now + min(2**rec.wakes, 4), rec.wakes + 1
        rec.patience = 2 * self._queue_time()
        self.room.count += 1
        return rec.rid, rec.wake_n

    def _queue_time(self):
        """How long a wake-up sent now may take to its claim: those in flight over the claims of the last 5 s."""
        recent = [t for t in self.room.claims if t > self.sim.now - 5]
        return min(len(self.room.dispatched) * 5 / max(len(recent), 0.01), MAX_QUEUE_TIME)

    def _turns(self, limit):
        """Dispatches while there is place: start-time fair queueing between tenants; who was served before first."""
        turns = []
        while (
            self.room.tenants
            and (self.room.count if self.sim.mutated("plain_count") else len(self.room.dispatched)) < limit
        ):
            tenant = min(self.room.tenants, key=self.room.tenants.get)
            queue = self.room.waiting.get(tenant)
            rid = min(queue, key=queue.get) if queue else None
            rec = self._write(rid) if rid else None
            room, self.room_before = self.room, None
            if queue:
                del queue[rid]
            if rec and rec.state == "QUEUED":
                if not rec.charged:
                    room.virtual = max(room.virtual, room.tenants[tenant])
                    room.tags[tenant] = room.tenants[tenant] = room.tenants[tenant] + 1 / self.sim.weights.get(
                        tenant, 1
                    )
                rec.charged, room.dispatched[rid] = True, self.sim.now
                turns.append(self._wake(rec))
            if not queue:
                room.tenants.pop(tenant), room.waiting.pop(tenant, None)
                room.tags = {t: f for t, f in room.tags.items() if f > room.virtual}
        return turns

    def _live(self, rid):
        """(record, None), or (None, the reply) when there is nothing to do any more."""
        rec = self.recs.get(rid)
        if rec is None:
            return None, ("GONE",)
        if rec.state in FINAL:
            return None, ("FINAL", rec.state)
        self._write(rid)
        if self.sim.now >= rec.deadline:
            self._end(rec, "EXPIRED")
            return None, ("FINAL", rec.state)
        return rec, None

    def _end(self, rec, state):
        if rec.state in FINAL:
            self.sim.fail("FINAL_STATE_CHANGED", f"{rec.rid} {rec.state} to {state}")
        self._leave(rec)
        rec.state, rec.owners, rec.final_at = state, {}, self.sim.now
        self.sim.feed(rec.gateway, rec.rid, None, 0, (), 0)

    def _requeue(self, rec):
        rec.state, rec.epoch, rec.owners = "QUEUED", rec.epoch + 1, {}
        self._enter(rec)

    def _refused(self, rec, epoch, tok, state):
        """None if (epoch, token) may write. A newer epoch than the record has proves lost writes: it follows."""
        sim = self.sim
        if sim.mutated("no_fences"):
            return None
        if rec.epoch < epoch and not sim.mutated("no_adopt_newer"):
            rec.epoch, rec.owners, rec.state = epoch, {tok: 0}, state
            self._leave(rec)
            sim.stats["adopted newer epoch"] += 1
        if rec.epoch != epoch or (tok not in rec.owners and not sim.mutated("epoch_without_token")):
            return ("STALE", rec.epoch)
        if sim.mutated("strict_lease") and 0 < rec.owners.get(tok, 0) < sim.now:
            return ("STALE", rec.epoch)
        if tok in rec.owners:
            rec.owners[tok] = sim.now + LEASE
        return None

    def accept(self, rid, seed, deadline, k, gateway, tenant, priority, limit):
        if rid in self.recs:
            return ("EXISTS", [])
        self._write(rid)
        rec = self.recs[rid] = Record(rid, seed, deadline, k, gateway, self.sim.now, tenant, priority)
        self._enter(rec)
        turns = self._turns(limit)
        return ("DISPATCH" if rid in self.room.dispatched else "WAIT", turns)

    def attach(self, rid, gateway):
        if rid in self.recs:
            self.recs[rid].gateway = gateway
        return self.read(rid)

    def read(self, rid):
        rec = self.recs.get(rid)
        return ("OK", rec.state, [list(x) for x in rec.log], list(rec.fin)) if rec else ("GONE",)

    def claim(self, rid, tok, hedge, limit):
        """Never asks the room: who has a wake-up may claim, also one that waits again (it leaves out of turn)."""
        rec, reply = self._live(rid)
        if reply:
            return reply
        if tok not in rec.owners:
            self._leave(rec)
            if rec.state == "QUEUED":
                rec.state, rec.epoch, rec.attempts = "PREFILLING", rec.epoch + 1, rec.attempts + 1
                self.room.claims = (*self.room.claims[-199:], self.sim.now)
                self.sim.claimed(rec)
            elif not (hedge and rec.state == "PREFILLING" and len(rec.owners) < REPLICAS):
                return ("BUSY",)
            rec.owners[tok] = self.sim.now + LEASE
        return ("OK", rec.epoch, rec.seed, [list(x) for x in rec.log], list(rec.fin), self._turns(limit), rec.crashes)

    def append_batch(self, items):
        return [self._append(*item) for item in items]

    def _append(self, rid, epoch, tok, state, c, index, ids, prefix_hash, fin):
        sim = self.sim
        rec, reply = self._live(rid)
        if reply:
            return None if sim.mutated("ignore_final") else reply
        if not sim.mutated("no_epoch_check"):
            refused = self._refused(rec, epoch, tok, state)
            if refused:
                return refused
        log = rec.log[c]
        if rec.fin[c]:
            return None
        if index != len(log) and not sim.mutated("no_index_check"):
            return ("GAP" if index > len(log) else "DUP", len(log))
        if hash_of(log) != prefix_hash and not sim.mutated("no_prefix_hash") and not sim.mutated("no_index_check"):
            return ("FORK",)
        log.extend(ids)
        sim.feed(rec.gateway, rec.rid, c, index, ids, prefix_hash)
        if fin:
            rec.fin[c] = True
            if all(rec.fin):
                self._end(rec, "FINISHED")
        return None

    def handoff(self, rid, epoch, tok, new):
        rec, reply = self._live(rid)
        if reply:
            return reply
        if new not in rec.owners:
            refused = self._refused(rec, epoch, tok, "PREFILLING")
            if refused and not self.sim.mutated("handoff_unchecked"):
                return refused
            rec.epoch += not self.sim.mutated("handoff_keeps_epoch")
            rec.state, rec.owners = "DECODING", {new: self.sim.now + LEASE}
        return ("OK", rec.epoch, [len(x) for x in rec.log], list(rec.fin))

    def renew(self, items):
        replies = []
        for rid, epoch, tok, state in items:
            rec, reply = self._live(rid)
            if reply and self.sim.mutated("ignore_final"):
                reply = None
            elif rec and self.sim.mutated("renew_unchecked"):
                rec.owners = dict.fromkeys([*rec.owners, tok], self.sim.now + LEASE)
            elif rec:
                reply = self._refused(rec, epoch, tok, state)
            replies.append(reply)
        return replies

    def release(self, rid, epoch, tok, limit):
        rec, reply = self._live(rid)
        if reply:
            return reply
        refused = self._refused(rec, epoch, tok, "PREFILLING")
        if refused:
            return refused
        rec.owners.pop(tok, None)
        if not rec.owners:
            self._requeue(rec)
        return ("OK", rec.state, self._turns(limit))

    def cancel(self, rid, limit):
        if self.sim.mutated("final_not_final") and rid in self.recs:
            self._end(self._write(rid) and self.recs[rid], "CANCELLED")
            return ("OK", 0, [])
        rec, reply = self._live(rid)
        if rec:
            self._end(rec, "CANCELLED")
        return reply or ("OK", rec.wake_n, self._turns(limit))

    def refill(self, rid, c, index, ids, prefix_hash):
        rec, reply = self._live(rid)
        if reply:
            return reply
        if index != len(rec.log[c]) or hash_of(rec.log[c]) != prefix_hash or rec.fin[c]:
            return ("AT", len(rec.log[c]))
        rec.log[c].extend(ids)
        self.sim.stats["tokens refilled"] += len(ids)
        return ("OK",)

    def reap(self, limit, idle):
        now, wake, sim = self.sim.now, [], self.sim
        if now - self.last_reap > 2 * REAP:
            self.grace_until = now + LEASE  # nobody reaped for a while: let the owners renew first
        self.last_reap = now
        for rid, rec in self.recs.items():
            if rec.state in FINAL:
                continue
            if now >= rec.deadline:
                self._live(rid)
            elif rec.state == "QUEUED":
                if now >= rec.wake_at and not sim.mutated("no_wake"):
                    self._write(rid)
                    if rid not in self.room.dispatched:
                        if not sim.mutated("count_drifts"):
                            self._enter(rec)  # it waits; if a room that lost it did not know, now it does
                    elif sim.mutated("turn_not_repeated"):
                        continue
                    elif sim.mutated("eager_wake") or (
                        (idle or now - rec.woken_at > rec.patience) and self._may_wake()
                    ):
                        wake.append(self._wake(rec))
                        self.room.dispatched[rid], self.room_before = now, None
                        sim.stats["wake-ups repeated"] += 1
            elif max(rec.owners.values(), default=0) < now and not sim.mutated("no_takeover"):
                if now < self.grace_until and not sim.mutated("no_grace"):
                    continue
                self._write(rid)
                self._take_over(rec)
        if not sim.mutated("count_drifts"):  # the oldest of the set: a place held for nobody is given back
            for rid in sorted(self.room.dispatched, key=self.room.dispatched.get)[:64]:
                if rid not in self.recs or self.recs[rid].state != "QUEUED":
                    self._write(rid)
                    del self.room.dispatched[rid]
                    self.room_before = None
                    sim.stats["phantoms removed"] += 1
        return ("OK", wake if sim.mutated("no_wake") else wake + self._turns(limit))

    def _may_wake(self):
        """Token bucket: repeats of the reapers, at most WAKE_RATE a second in all."""
        at, left = self.wake_budget
        left = min(left + (self.sim.now - at) * WAKE_RATE, WAKE_RATE)
        self.wake_budget = self.sim.now, left - (left >= 1)
        return left >= 1

    def _take_over(self, rec):
        sim = self.sim
        rec.crashes += not sim.mutated("no_crash_limit")
        sim.stats["takeovers"] += 1
        if sim.only_outages:
            sim.fail(
                "TAKEOVER_WITHOUT_CAUSE", f"{rec.rid} {rec.state}: no worker fault and no lost write in this storm"
            )
        if rec.crashes >= MAX_CRASHES:
            self._end(rec, "FAILED")
        else:
            self._requeue(rec)

    def evict(self, incarnation, limit):
        """The end of this incarnation is proven (waitpid, pidfd): its sequences need not wait for their leases."""
        for rid, rec in self.recs.items():
            mine = [t for t in rec.owners if t.startswith(incarnation + ".")]
            if mine and self._live(rid)[0]:
                if self.sim.alive(incarnation) and max(rec.owners.values()) >= self.sim.now:
                    self.sim.fail(
                        "TAKEOVER_WITHOUT_CAUSE",
                        f"{rid}: {mine} evicted, but its process lives and the lease is not over",
                    )
                for t in mine:
                    del rec.owners[t]
                if not rec.owners:
                    self.sim.stats["takeovers by evict"] += 1
                    self._take_over(rec)
        return ("OK", self._turns(limit))
