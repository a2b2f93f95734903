"""The functions of the state server for a storm, on a real server: the same methods as `MemoryRedis`.

Calls go through `StateStore` to the library's twin with a test clock (`kvstore.state.library.with_test_clock`), which
this class moves with the storm's. What a storm does to the server is done to the real keys: FLUSHALL, a damaged room,
and a failover that loses the last writes (each write is preceded by a DUMP of what it may change).

The limit of the waiting room is infinite here, so its rules of fairness stay with the model.
"""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import redis

from kvstore.errors import BadRecord
from kvstore.state import (
    AppendItem,
    Attached,
    Cancelled,
    Claimed,
    Dup,
    Evicted,
    Final,
    FinEntry,
    Fork,
    Gap,
    Gone,
    HandedOff,
    NewRequest,
    Ok,
    Released,
    RenewItem,
    Stale,
    StateStore,
    TokenEntry,
)
from kvstore.state.hashing import hash_of
from kvstore.state.keys import live_key, log_key, record_key
from kvstore.state.library import TEST_CLOCK_KEY, Library, with_test_clock
from tests.protocol.kernel import FINAL, LOSS_WINDOW, REPLICAS

BEGIN_MS = 1_000_000_000_000  # a storm begins at 0 s, a server's clock does not
ROOM_KEYS = ("cel:{s00}:dispatched", "cel:{s00}:room")
_encode = msgspec.msgpack.encode
_decode_tokens = msgspec.msgpack.Decoder(TokenEntry).decode


def key_of(rid):
    """The storm's `r3` as a request id."""
    return f"{rid}-s00"


def name_of(key):
    return key.removesuffix("-s00")


class RealRedis:
    """One storm's server. The database is emptied when it is made. `break_rule` (text, other text) plants a bug."""

    def __init__(self, sim, *, url, break_rule=("", "")):
        self.sim = sim
        library = with_test_clock()
        assert break_rule[0] in library.source, "the rule to break is no longer in the functions"
        library = Library(library.name, library.source.replace(*break_rule, 1))
        self.store = StateStore(url, functions=library, timeout_s=5.0)
        self.raw = redis.Redis.from_url(url, protocol=2)
        self.down_until, self.gone_at, self.clock_ms = 0.0, {}, -1
        self.gateways, self.cursors, self.choices = {}, {}, {}
        self.tokens, self.crashes, self.ends, self.undo = set(), {}, {}, []
        self.raw.flushall()
        self.store.load_library()

    # -- what a storm looks at
    def find(self, rid):
        """The record, for the invariants; None if there is none. A final state never changes into another."""
        record = self.store.record(key_of(rid))
        if record is None:
            return None
        state = record.state.value
        if self.ends.setdefault(rid, state if state in FINAL else None) not in (None, state):
            self.sim.fail("FINAL_STATE_CHANGED", f"{rid} {self.ends[rid]} to {state}")
        self.ends[rid] = state if state in FINAL else None
        final_at = (record.stamps["finished"] - BEGIN_MS) / 1000 if state in FINAL else None
        return SimpleNamespace(
            rid=rid,
            state=state,
            epoch=record.epoch,
            owners={token: (end - BEGIN_MS) / 1000 for token, end in record.owners.items()},
            crashes=record.crash_attempts,
            final_at=final_at,
            wakes="?",
            wake_at=record.wake_n,
        )

    def all(self):
        return [record for rid in self.choices if (record := self.find(rid)) is not None]

    @property
    def room(self):
        return SimpleNamespace(dispatched=self.raw.zrange(ROOM_KEYS[0], 0, -1), waiting={})

    # -- what a storm does to the server
    def failover(self, k, outage):
        """The new primary lacks the last k writes, none older than the loss window."""
        while k and self.undo and self.undo[-1][0] > self.sim.now - LOSS_WINDOW:
            _, rid, dumps, score = self.undo.pop()
            k -= 1
            commands = self.raw.pipeline(transaction=False)
            for key, dump in dumps.items():
                commands.delete(key)
                if dump is not None:
                    commands.restore(key, 0, dump)
            if score is None:
                commands.zrem(live_key(0), key_of(rid))
            else:
                commands.zadd(live_key(0), {key_of(rid): score})
            commands.execute()
            if dumps[record_key(key_of(rid))] is None:
                self.gone_at[rid] = self.sim.now
        self.undo.clear()
        self.ends.clear()
        self.down_until = self.sim.now + outage

    def flushall(self):
        self.gone_at.update({record.rid: self.sim.now for record in self.all()})
        self.raw.flushall()
        self.undo.clear()
        self.ends.clear()
        self.clock_ms = -1

    def scramble(self):
        """The room is damaged (a DEL by hand, a bug): places held for nobody, members lost."""
        rng = self.sim.rng
        for i in range(rng.choice([0, 1, 5, 20])):
            self.raw.zadd(ROOM_KEYS[0], {f"phantom{i}-s00": self._now_ms()})
        for member in self.raw.zrange(ROOM_KEYS[0], 0, -1):
            if rng.random() < 0.3:
                self.raw.zrem(ROOM_KEYS[0], member)

    # -- the functions
    def accept(self, rid, seed, deadline, k, gateway, tenant, priority, _limit):
        self.choices[rid] = k
        self._before(rid)
        reply = self.store.accept(
            NewRequest(
                rid=key_of(rid),
                model="m",
                tenant=tenant,
                priority=priority,
                deadline_in_s=deadline - self.sim.now,
                seed=seed,
                k=k,
                params=b"",
                prompt_ids=[],
                gateway=self._name(gateway),
                body_hash="b",
            )
        )
        return ("DISPATCH" if reply.status == "OK" else "EXISTS", _turns(reply.turns))

    def attach(self, rid, gateway):
        self._before(rid)
        reply = self.store.attach(key_of(rid), self._name(gateway))
        self._hints()
        if not isinstance(reply, Attached):
            return _words(reply)
        return ("OK", reply.state.value, self._ids(rid), reply.fin)

    def claim(self, rid, tok, hedge, _limit):
        self._before(rid)
        reply = self.store.claim(key_of(rid), tok, hedge=hedge, replicas=REPLICAS)
        self._hints()
        if not isinstance(reply, Claimed):
            return _words(reply)
        if tok not in self.tokens:
            self.tokens.add(tok)
            self.sim.claimed(SimpleNamespace(rid=rid, tenant=reply.body.tenant))
        turns = _turns(reply.turns)
        return ("OK", reply.epoch, reply.body.seed, self._ids(rid), reply.fin, turns, reply.crash_attempts)

    def append_batch(self, items):
        self._before(*{item[0] for item in items})
        replies = self.store.append_batch([_append_item(*item) for item in items])
        self._hints()
        return [None if isinstance(reply, Ok) else _words(reply) for reply in replies]

    def handoff(self, rid, epoch, tok, new):
        self._before(rid)
        reply = self.store.handoff(key_of(rid), epoch, tok, new)
        self._hints()
        return ("OK", reply.epoch, reply.n, reply.fin) if isinstance(reply, HandedOff) else _words(reply)

    def renew(self, items):
        self._before(*{item[0] for item in items})
        renewals = [RenewItem(key_of(rid), epoch, tok, state) for rid, epoch, tok, state in items]
        lost = dict(self.store.renew(renewals))
        self._hints()
        return [_words(lost[renewal]) if renewal in lost else None for renewal in renewals]

    def release(self, rid, epoch, tok, _limit):
        self._before(rid)
        reply = self.store.release(key_of(rid), epoch, tok)
        self._hints()
        return ("OK", reply.state.value, _turns(reply.turns)) if isinstance(reply, Released) else _words(reply)

    def cancel(self, rid, _limit):
        self._before(rid)
        reply = self.store.cancel(key_of(rid), "user")
        self._hints()
        return ("OK", reply.wake_n, _turns(reply.turns)) if isinstance(reply, Cancelled) else _words(reply)

    def refill(self, rid, c, index, ids, prefix_hash):
        self._before(rid)
        entry = TokenEntry(index, prefix_hash, tuple(ids), ("",) * len(ids))
        reply = self.store.refill(key_of(rid), c, entry, new_hash=hash_of(ids, start=prefix_hash))
        self._hints()
        if isinstance(reply, Ok):
            self.sim.stats["tokens refilled"] += len(ids)
        return _words(reply)

    def reap(self, _limit, idle):
        return ("OK", self._taking_over(lambda: self.store.reap(0, idle=idle)))

    def evict(self, incarnation, _limit):
        return ("OK", self._taking_over(lambda: self.store.evict(incarnation, "exited")))

    # -- private
    def _taking_over(self, call):
        """`reap` and `evict` touch any request. Takeovers are seen by their count of crashes."""
        self._before(*self.choices)
        before = {record.rid: record.crashes for record in self.all()}
        reply = call()
        self._hints()
        taken = [record for record in self.all() if record.crashes > before.get(record.rid, 0)]
        self.sim.stats["takeovers"] += len(taken)
        if isinstance(reply, Evicted):
            self.sim.stats["takeovers by evict"] += len(taken)
        else:
            self.sim.stats["wake-ups repeated"] += len(reply.turns) - sum(x.state == "QUEUED" for x in taken)
        if taken and self.sim.only_outages:
            record = taken[0]
            self.sim.fail("TAKEOVER_WITHOUT_CAUSE", f"{record.rid}: no worker fault and no lost write in this storm")
        return _turns(reply.turns)

    def _before(self, *rids):
        """Sets the server's clock; keeps what a failover may take back."""
        now_ms = self._now_ms()
        if now_ms != self.clock_ms:
            self.raw.set(TEST_CLOCK_KEY, now_ms)
            self.clock_ms = now_ms
        if not self.sim.can_fail_over:
            return
        for rid in rids:
            if rid not in self.choices:
                continue
            logs = [log_key(key_of(rid), c) for c in range(self.choices[rid])]
            keys = [record_key(key_of(rid)), *logs, *ROOM_KEYS]
            commands = self.raw.pipeline(transaction=False)
            for key in keys:
                commands.dump(key)
            commands.zscore(live_key(0), key_of(rid))
            *dumps, score = commands.execute()
            self.undo.append((self.sim.now, rid, dict(zip(keys, dumps, strict=True)), score))
        del self.undo[:-80]

    def _now_ms(self):
        return BEGIN_MS + int(self.sim.now * 1000)

    def _name(self, gateway):
        self.gateways[gateway.incarnation] = gateway
        return gateway.incarnation

    def _hints(self):
        """Delivers what came into the feeds, as a gateway's reader would."""
        for name, gateway in self.gateways.items():
            for item in self.store.read_feed(name, self.cursors.setdefault(name, {}), 0):
                rid = name_of(item.rid)
                if item.tokens:
                    entry = _decode_tokens(item.tokens)
                    self.sim.feed(gateway, rid, item.c, entry.index, list(entry.token_ids), item.prefix_hash)
                if item.fin:
                    self.sim.feed(gateway, rid, None, 0, (), 0)

    def _ids(self, rid):
        try:
            return self.store.read_ids(key_of(rid), self.choices[rid])
        except BadRecord as error:
            self.sim.fail("LOG_BROKEN", str(error))


def _append_item(rid, epoch, tok, state, c, index, ids, prefix_hash, fin):
    tokens = _encode(TokenEntry(index, prefix_hash, tuple(ids), ("",) * len(ids))) if ids else b""
    new_hash = hash_of(ids, start=prefix_hash)
    end = _encode(FinEntry("FINISHED", "stop")) if fin else None
    return AppendItem(key_of(rid), epoch, tok, state, c, index, prefix_hash, new_hash, len(ids), tokens, end)


def _turns(turns):
    return [(name_of(turn.rid), turn.wake_n) for turn in turns]


def _words(reply):
    """A typed reply as the tuple that the storm's processes know."""
    match reply:
        case Ok():
            return ("OK",)
        case Gone():
            return ("GONE",)
        case Final():
            return ("FINAL", reply.state.value)
        case Stale():
            return ("STALE", reply.epoch)
        case Gap() | Dup():
            return (type(reply).__name__.upper(), reply.n)
        case Fork():
            return ("FORK",)
        case _:
            return (type(reply).__name__.upper(),)
