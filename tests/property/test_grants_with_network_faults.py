"""Writer, receiver and a network that delays, doubles and cuts: no block is in two states, lost, or written after free.

The writer here keeps the writer's rules of the protocol; the real table of the receiver is driven in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.blocks import (
    Action,
    AskEngine,
    BlockPool,
    BlocksReleased,
    Delivered,
    GrantState,
    GrantTable,
    OutOfBlocks,
    Reservation,
    SendFence,
    SendGrant,
    SendHanded,
    SendRefused,
    Verify,
)

NUM_BLOCKS = 6


@dataclass
class Writer:
    """One connection's writer. `open` maps a transfer to its grant once it has one; a closed one is not in it."""

    peer: int
    is_alive: bool = True
    open: dict[str, SendGrant | None] = field(default_factory=dict)
    committed: set[str] = field(default_factory=set)
    to_receiver: list[tuple[str, str, str]] = field(default_factory=list)  # (kind, xfer, grant id), in order
    from_receiver: list[Action] = field(default_factory=list)


class Grants(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.now = 0.0
        self.pool = BlockPool(NUM_BLOCKS)
        self.table = GrantTable("d0")
        self.writers: dict[int, Writer] = {}
        self.asked: list[str] = []
        self.verifying: list[str] = []
        self.delivered: list[str] = []
        self.sequences: list[list[int]] = []
        self.released: set[str] = set()
        self.blocks_of: dict[str, list[int]] = {}
        self.counter = 0
        for _ in range(2):
            self.connect()

    # ------------------------------------------------------------ the receiver's surroundings
    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case AskEngine(xfer):
                    self.asked.append(xfer)
                case Verify(xfer):
                    self.verifying.append(xfer)
                case Delivered(xfer):
                    self.delivered.append(xfer)
                case BlocksReleased(xfer, blocks):
                    assert xfer not in self.released, "released twice"
                    self.released.add(xfer)
                    self.delivered = [other for other in self.delivered if other != xfer]
                    self.pool.free(blocks)
                case SendGrant() | SendRefused() | SendHanded() | SendFence():
                    if self.writers[action.peer].is_alive:
                        self.writers[action.peer].from_receiver.append(action)

    @rule()
    def connect(self) -> None:
        self.counter += 1
        self.writers[self.counter] = Writer(self.counter)

    @precondition(lambda self: self.asked)
    @rule(wants=st.booleans())
    def engine_answers(self, wants: bool) -> None:
        xfer = self.asked.pop(0)
        try:
            blocks = self.pool.allocate(self.table.reservation(xfer).num_blocks) if wants else None
        except OutOfBlocks:
            blocks = None
        if blocks is not None:
            self.blocks_of[xfer] = blocks
        self.perform(self.table.answer(xfer, blocks, self.now))

    @precondition(lambda self: self.verifying)
    @rule(is_good=st.booleans())
    def verified(self, is_good: bool) -> None:
        self.perform(self.table.verdict(self.verifying.pop(0), is_good=is_good, reason="checksum"))

    @precondition(lambda self: self.delivered)
    @rule(handed=st.booleans())
    def settle(self, handed: bool) -> None:
        xfer = self.delivered.pop(0)
        if handed:
            self.sequences.append(self.blocks_of[xfer])
        self.perform(self.table.settle(xfer, is_handed=handed, now_s=self.now))

    @precondition(lambda self: self.sequences)
    @rule()
    def sequence_ends(self) -> None:
        self.pool.free(self.sequences.pop(0))

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        leased = [x for x in self.blocks_of if (g := self.table.find(x)) and g.state is GrantState.LEASED]
        if leased:
            self.perform(self.table.settle(data.draw(st.sampled_from(leased)), is_handed=False, now_s=self.now))

    @rule(seconds=st.sampled_from([0.1, 0.6, 2.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.table.tick(self.now))

    # ------------------------------------------------------------ the writer
    def pick(self, data: st.DataObject) -> Writer:
        return self.writers[data.draw(st.sampled_from(sorted(self.writers)))]

    @rule(data=st.data(), num_blocks=st.integers(1, 4))
    def reserve(self, data: st.DataObject, num_blocks: int) -> None:
        writer = self.pick(data)
        if writer.is_alive:
            self.counter += 1
            xfer = f"w{writer.peer}:{self.counter}"
            writer.open[xfer] = None
            writer.to_receiver.append((f"RESERVE{num_blocks}", xfer, ""))

    @rule(data=st.data())
    def writer_writes(self, data: st.DataObject) -> None:
        """The check that all of this is for: a page that a writer may write still belongs to its grant."""
        writer = self.pick(data)
        for xfer, grant in writer.open.items():
            if writer.is_alive and grant is not None and xfer not in writer.committed:
                held = self.table.find(xfer)
                assert held is not None, f"{xfer} writes after free"
                assert held.grant_id == grant.grant_id
                assert held.blocks == grant.blocks
                assert all(self.pool.ref_count(block) == 1 for block in grant.blocks)

    @rule(data=st.data(), kind=st.sampled_from(["COMMIT", "COMMIT", "ABORT"]))
    def writer_ends(self, data: st.DataObject, kind: str) -> None:
        writer = self.pick(data)
        if not writer.is_alive or not writer.open:
            return
        xfer = data.draw(st.sampled_from(sorted(writer.open)))
        grant = writer.open[xfer]
        if kind == "COMMIT" and grant is not None:
            writer.committed.add(xfer)  # and again: it is repeated
            writer.to_receiver.append(("COMMIT", xfer, grant.grant_id))
        elif kind == "ABORT":
            del writer.open[xfer]
            writer.to_receiver.append(("ABORT", xfer, grant.grant_id if grant else ""))

    @rule(data=st.data())
    def writer_reads(self, data: st.DataObject) -> None:
        writer = self.pick(data)
        if not writer.is_alive or not writer.from_receiver:
            return
        match writer.from_receiver.pop(0):
            case SendGrant() as grant:
                if grant.xfer in writer.open:
                    writer.open[grant.xfer] = grant
                else:
                    writer.to_receiver.append(("ABORT", grant.xfer, grant.grant_id))
            case SendFence(_, xfer, grant_id):
                writer.open.pop(xfer, None)
                writer.to_receiver.append(("FENCED", xfer, grant_id))
            case SendRefused(_, xfer, _) | SendHanded(_, xfer):
                writer.open.pop(xfer, None)

    @rule(data=st.data(), is_doubled=st.booleans())
    def network_delivers(self, data: st.DataObject, is_doubled: bool) -> None:
        writer = self.pick(data)
        if not writer.to_receiver:
            return
        kind, xfer, grant_id = writer.to_receiver.pop(0)
        for _ in range(2 if is_doubled else 1):
            if kind.startswith("RESERVE"):
                self.perform(self.table.on_reserve(Reservation(xfer, "r", 1, "t", int(kind[7:])), writer.peer))
            elif kind == "COMMIT":
                self.perform(self.table.on_commit(xfer, grant_id, writer.peer))
            else:
                self.perform(self.table.on_writer_done(xfer, writer.peer))

    @rule(data=st.data())
    def silence(self, data: st.DataObject) -> None:
        self.perform(self.table.on_unreachable(self.pick(data).peer, self.now))

    @rule(data=st.data())
    def writer_dies(self, data: st.DataObject) -> None:
        """EOF: what it sent before still comes first, in order."""
        writer = self.pick(data)
        if writer.is_alive:
            writer.is_alive = False
            writer.from_receiver.clear()
            while writer.to_receiver:
                kind, xfer, grant_id = writer.to_receiver.pop(0)
                if kind == "COMMIT":
                    self.perform(self.table.on_commit(xfer, grant_id, writer.peer))
                elif kind in ("ABORT", "FENCED"):
                    self.perform(self.table.on_writer_done(xfer, writer.peer))
            self.perform(self.table.on_channel_dead(writer.peer))

    # ------------------------------------------------------------ what always holds
    @invariant()
    def tables_are_sound(self) -> None:
        self.table.check_invariants()
        self.pool.check_invariants()

    @invariant()
    def no_block_is_lost_or_held_twice(self) -> None:
        in_grants = sum(self.table.blocks_by_state().values())
        in_sequences = sum(map(len, self.sequences))
        assert self.pool.num_used == in_grants + in_sequences

    def teardown(self) -> None:
        """After the storm: all writers die, the engine settles everything, and every block is free."""
        for writer in self.writers.values():
            writer.is_alive = False
            self.perform(self.table.on_channel_dead(writer.peer))
        self.drain()
        assert self.pool.num_free == NUM_BLOCKS, self.table.blocks_by_state()

    def drain(self) -> None:
        while self.asked:
            self.perform(self.table.answer(self.asked.pop(0), None, self.now))
        while self.verifying:
            self.perform(self.table.verdict(self.verifying.pop(0), is_good=False, reason="checksum"))
        while self.delivered:
            self.perform(self.table.settle(self.delivered.pop(0), is_handed=False, now_s=self.now))
        while self.sequences:
            self.pool.free(self.sequences.pop(0))


Grants.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestGrants = Grants.TestCase
