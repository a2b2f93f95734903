"""KV blocks of a worker in a storm, and what holds them. A write to a block that is not its writer's is caught here."""

from __future__ import annotations


class Pool:
    def __init__(self, sim, size, name):
        self.sim, self.name = sim, name
        self.state, self.holder, self.content = ["FREE"] * size, [None] * size, [None] * size

    def take(self, n, holder, state):
        free = [b for b, s in enumerate(self.state) if s == "FREE"][:n]
        if len(free) < n:
            return None
        for b in free:
            self.state[b], self.holder[b], self.content[b] = state, holder, None
        return free

    def move(self, blocks, old, new, state):
        """Every change of a block names the holder it believes in: two owners, or a double free, show here."""
        for b in blocks:
            if self.holder[b] != old:
                self.sim.fail("BLOCK_TWO_OWNERS", f"{self.name}[{b}] is {self.holder[b]}'s, not {old}'s")
            self.state[b], self.holder[b] = state, new

    def land(self, block, grant_id, content):
        """A one-sided write: nobody checks it on the way, so the rules must have kept the block for its writer."""
        if self.holder[block] != grant_id or self.state[block] not in ("LEASED", "QUARANTINED"):
            self.sim.fail(
                "WRITE_AFTER_REUSE",
                f"{grant_id} wrote {self.name}[{block}] of {self.holder[block]} {self.state[block]}",
            )
        self.content[block] = content


class Job:
    """One sequence group (all choices of a request) held by a worker."""

    def __init__(self, rid, tok, now):
        self.rid, self.token, self.epoch, self.state, self.seed = rid, tok, 0, "PREFILLING", 0
        self.out, self.cursor, self.fin_sent, self.blocks = [], [], [], []
        self.last_ok, self.stepping, self.dead, self.pushes, self.unowned_since, self.promoting = (
            now,
            False,
            False,
            [],
            None,
            False,
        )
        self.ahead = 0  # tokens stepped while suspended


class Push:
    def __init__(self, xfer, peer):
        self.xfer, self.peer, self.grant, self.dst, self.closed, self.inflight, self.result = (
            xfer,
            peer,
            None,
            None,
            False,
            0,
            None,
        )


class Grant:
    def __init__(self, gid, xfer, writer, rid, epoch, tok, blocks, expires):
        self.id, self.xfer, self.writer, self.rid, self.epoch, self.token = gid, xfer, writer, rid, epoch, tok
        self.blocks, self.expires, self.state, self.fence_at = blocks, expires, "LEASED", 0.0
