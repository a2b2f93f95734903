"""Virtual time for the storms: a heap of events, and processes made of generators.

A generator yields a delay in seconds, or a call of the state server (a tuple: function, arguments) whose reply it is
sent, None standing for "no reply". A process that is killed loses its generators; one that is paused gets its wake-ups
late (a zombie). `token()` stands for the language model: exact storms give equal tokens on every worker (fp32),
inexact ones do not (bf16): then a client may be told DIVERGED, but must never get a text spliced from two versions.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections import Counter, defaultdict

FINAL = ("FINISHED", "FAILED", "CANCELLED", "EXPIRED")
LEASE, RENEW, SELF_FENCE, REAP = 2.0, 0.5, 1.5, 0.5  # seconds, as in the protocol
MAX_CRASHES, REPLICAS = 3, 2
WORK_AFTER_END = 3.5  # SELF_FENCE, the steps while suspended, and some slack
WORK_AFTER_CLIENT_END = 8.0
GRANT_LEASE = 1.0  # 5 s in the protocol, scaled as the lengths of the requests are
LOSS_WINDOW = 1.0  # a failover loses no write older than that
SEQ_BLOCKS = 3
STEP_ON, STEP_UNTIL = 30, 3.0  # steps while suspended: 256 tokens and 5 s in the protocol
ROOMS = (0.4, 1, 2, 1000)  # places in the broker's queue per live worker; 1000: no room
EVICT_SHARE = 0.7  # of the kills, seen by a supervisor
WAKE_RATE = 50  # repeats of wake-ups a second
AUDIT = 4.0
MAX_QUEUE_TIME = 30.0
IDLE_HINT = 1.0
IDLE_LIMIT = 6.5  # the longest time between two wake-ups, and a reaper's turn
MUTATIONS = (
    *("no_epoch_check", "epoch_without_token", "no_index_check", "ignore_gap", "no_prefix_hash", "no_resume_hash"),
    *("gateway_trusts_feed", "gateway_no_dedup", "handoff_unchecked", "handoff_keeps_epoch", "renew_unchecked"),
    *("strict_lease", "no_adopt_newer", "no_takeover", "no_wake", "no_grace", "no_crash_limit", "no_self_fence"),
    *("fence_drops_kv", "ignore_final", "final_not_final", "no_refill", "no_reaccept", "free_on_timeout"),
    *("fence_forgotten", "commit_early", "no_checksum", "free_source_early", "local_dup_claim", "feed_no_hash"),
    *("finish_unsettled", "no_fences", "own_handoff_is_stale", "evict_unproven", "reused_task_id", "wake_counter"),
    *("eager_wake", "turn_not_repeated", "count_drifts", "plain_count", "step_on_for_ever", "crashed_run_together"),
)


class Violation(Exception):
    """A promise was broken: `<INVARIANT>: <what> (seed, time)`."""


def token(seed, choice, idx, prefix_hash, salt):
    return zlib.crc32(b"%d.%d.%d.%d.%d" % (seed, choice, idx, prefix_hash, salt)) % 50_000


class Sim:
    def __init__(self, seed, mutate=None, trace=False):
        self.rng, self.broken, self.trace, self.seed = (
            random.Random(seed),
            frozenset((mutate or "").split("+")),
            trace,
            seed,
        )
        self.now, self.heap, self.serial, self.faulty, self.stats, self.samples = (
            0.0,
            [],
            0,
            True,
            Counter(),
            defaultdict(list),
        )

    def at(self, delay, fn, *args):
        self.serial += 1
        heapq.heappush(self.heap, (self.now + delay, self.serial, fn, args))

    def mutated(self, name):
        return name in self.broken

    def chance(self, p):  # faults only while the storm lasts
        return self.faulty and self.rng.random() < p

    def log(self, *words):
        if self.trace:
            print(f"{self.now:8.3f}", *words)

    def fail(self, invariant, detail=""):
        raise Violation(f"{invariant}: {detail} (seed {self.seed}, t={self.now:.3f})")

    def run(self, until):
        while self.heap and self.heap[0][0] <= until:
            self.now, _, fn, args = heapq.heappop(self.heap)
            fn(*args)
        self.now = until


class Process:
    def __init__(self, sim, name):
        self.sim, self.name, self.incarnation = sim, name, sim.incarnation(name)
        self.alive, self.paused_until, self.cut_until, self.counter = True, 0.0, 0.0, 0

    def mint(self):
        self.counter += 1
        return f"{self.incarnation}.{self.counter}"

    def spawn(self, gen):
        self.sim.at(0, self.step, gen, None)

    def step(self, gen, value):
        sim = self.sim
        if not self.alive:
            return
        if sim.now < self.paused_until:
            sim.at(self.paused_until - sim.now, self.step, gen, value)
            return
        try:
            wish = gen.send(value)
        except StopIteration:
            return
        if isinstance(wish, (int, float)):
            sim.at(wish, self.step, gen, None)
        else:
            self.redis_call(wish, gen)

    def redis_call(self, wish, gen):
        """The call may be lost before or after it ran; None stands for 'no reply'."""
        sim = self.sim

        def execute():
            if sim.now < max(sim.redis.down_until, self.cut_until) or sim.chance(sim.p_loss):
                sim.at(0.2, self.step, gen, None)
                return
            reply = getattr(sim.redis, wish[0])(*wish[1:])
            if wish[0] not in ("read", "reap", "renew"):
                sim.log(self.incarnation, wish, "->", reply)
            if sim.chance(sim.p_loss):
                sim.at(0.2, self.step, gen, None)
                return
            sim.at(sim.rng.uniform(0.0005, 0.003), self.step, gen, reply)

        sim.at(sim.rng.uniform(0.0005, 0.003), execute)

    def until_reply(self, *wish):
        while True:
            reply = yield wish
            if reply is not None:
                return reply
            yield 0.1
