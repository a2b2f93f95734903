"""Writer, receiver and a network that delays, doubles and cuts: no block is in two states, lost, or written after free.

The writer here keeps the writer's rules of the protocol; the real table of the receiver is driven in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable
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

NUM_BLOCKS = 16


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
                    assert xfer not in self.delivered, f"{xfer} is freed under the engine that was told it arrived"
                    self.pool.free(blocks)
                case SendGrant() | SendRefused() | SendHanded() | SendFence():
                    if self.writers[action.peer].is_alive:
                        self.writers[action.peer].from_receiver.append(action)

    def connect(self) -> None:
        self.counter += 1
        self.writers[self.counter] = Writer(self.counter)

    def engine_answers(self, wants: bool) -> None:
        xfer = self.asked.pop(0)
        try:
            blocks = self.pool.allocate(self.table.reservation(xfer).num_blocks) if wants else None
        except OutOfBlocks:
            blocks = None
        if blocks is not None:
            self.blocks_of[xfer] = blocks
        self.perform(self.table.answer(xfer, blocks, self.now))

    def verified(self, is_good: bool) -> None:
        self.perform(self.table.verdict(self.verifying.pop(0), is_good=is_good, reason="checksum"))

    def settle(self, handed: bool) -> None:
        xfer = self.delivered.pop(0)
        if handed:
            self.sequences.append(self.blocks_of[xfer])
        self.perform(self.table.settle(xfer, is_handed=handed, now_s=self.now))

    def sequence_ends(self) -> None:
        self.pool.free(self.sequences.pop(0))

    def cancel(self, data: st.DataObject) -> None:
        leased = [x for x in self.blocks_of if (g := self.table.find(x)) and g.state is GrantState.LEASED]
        if leased:
            self.perform(self.table.settle(data.draw(st.sampled_from(leased)), is_handed=False, now_s=self.now))

    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.perform(self.table.tick(self.now))

    # ------------------------------------------------------------ the writer
    def living(self) -> list[Writer]:
        """Few at a time, so that a storm gets far with each."""
        return [writer for writer in self.writers.values() if writer.is_alive]

    def writer_ends(self, data: st.DataObject, kind: str) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.living() if writer.open]))
        xfer = data.draw(st.sampled_from(sorted(writer.open)))
        grant = writer.open[xfer]
        if kind == "COMMIT" and grant is not None:
            writer.committed.add(xfer)  # and again: it is repeated
            writer.to_receiver.append(("COMMIT", xfer, grant.grant_id))
        elif kind == "ABORT":
            del writer.open[xfer]
            writer.to_receiver.append(("ABORT", xfer, grant.grant_id if grant else ""))

    def writer_reads(self, data: st.DataObject) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.living() if writer.from_receiver]))
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

    def network_delivers(self, data: st.DataObject, is_doubled: bool) -> None:
        writer = data.draw(st.sampled_from([writer for writer in self.living() if writer.to_receiver]))
        kind, xfer, grant_id = writer.to_receiver.pop(0)
        for _ in range(2 if is_doubled else 1):
            if kind.startswith("RESERVE"):
                self.perform(self.table.on_reserve(Reservation(xfer, "r", 1, "t", int(kind[7:])), writer.peer))
            elif kind == "COMMIT":
                self.perform(self.table.on_commit(xfer, grant_id, writer.peer))
            else:
                self.perform(self.table.on_writer_done(xfer, writer.peer))

    def silence(self, data: st.DataObject) -> None:
        self.perform(self.table.on_unreachable(data.draw(st.sampled_from(self.living())).peer, self.now))

    def writer_dies(self, data: st.DataObject) -> None:
        """EOF: what it sent before still comes first, in order."""
        writer = data.draw(st.sampled_from(self.living()))
        writer.is_alive = False
        writer.from_receiver.clear()
        while writer.to_receiver:
            kind, xfer, grant_id = writer.to_receiver.pop(0)
            if kind == "COMMIT":
                self.perform(self.table.on_commit(xfer, grant_id, writer.peer))
            elif kind in ("ABORT", "FENCED"):
                self.perform(self.table.on_writer_done(xfer, writer.peer))
        self.perform(self.table.on_channel_dead(writer.peer))

    # ------------------------------------------------------------ the storm: few rules, so that it gets far
    @precondition(lambda self: self.living())
    @rule(data=st.data(), num_blocks=st.integers(1, 4))
    def reserve(self, data: st.DataObject, num_blocks: int) -> None:
        writer = data.draw(st.sampled_from(self.living()))
        self.counter += 1
        xfer = f"w{writer.peer}:{self.counter}"
        writer.open[xfer] = None
        writer.to_receiver.append((f"RESERVE{num_blocks}", xfer, ""))

    @rule(data=st.data(), num_moves=st.integers(4, 12))
    def things_go_on(self, data: st.DataObject, num_moves: int) -> None:
        """What can happen next, in any order between the parties."""
        for _ in range(num_moves):
            moves = self.moves(data, is_good=data.draw(st.sampled_from([True, True, True, False])))
            if not moves:
                return
            data.draw(st.sampled_from(moves))()
            self.nobody_writes_after_free()

    @precondition(lambda self: self.delivered)
    @rule(handed=st.booleans())
    def engine_settles(self, handed: bool) -> None:
        """A rule of its own: `handoff` takes a round trip to the state server, and much happens meanwhile."""
        self.settle(handed)

    def moves(self, data: st.DataObject, *, is_good: bool) -> list[Callable[[], None]]:
        living = self.living()
        candidates: list[tuple[object, Callable[[], None]]] = [
            (self.asked, lambda: self.engine_answers(is_good)),
            (self.verifying, lambda: self.verified(is_good)),
            (any(writer.to_receiver for writer in living), lambda: self.network_delivers(data, not is_good)),
            (any(writer.from_receiver for writer in living), lambda: self.writer_reads(data)),
            (any(writer.open for writer in living), lambda: self.writer_ends(data, "COMMIT")),
            (self.sequences, self.sequence_ends),
        ]
        return [move for is_possible, move in candidates if is_possible]

    @rule(data=st.data(), kind=st.sampled_from(["time", "time", "cancel", "abort", "silence", "death", "reconnect"]))
    def trouble(self, data: st.DataObject, kind: str) -> None:
        if kind == "time":
            self.time_passes(data.draw(st.sampled_from([0.1, 0.6, 2.0, 6.0])))
        elif kind == "cancel":
            self.cancel(data)
        elif kind == "abort" and any(writer.open for writer in self.living()):
            self.writer_ends(data, "ABORT")
        elif kind == "silence" and self.living():
            self.silence(data)
        elif kind == "death" and self.living():
            self.writer_dies(data)
        elif kind == "reconnect" and len(self.living()) < 2:
            self.connect()

    # ------------------------------------------------------------ what always holds
    @invariant()
    def tables_are_sound(self) -> None:
        self.table.check_invariants()
        self.pool.check_invariants()

    @invariant()
    def nobody_writes_after_free(self) -> None:
        """What all of this is for: a page that a live writer may write still belongs to its grant, and to it alone."""
        for writer in self.writers.values():
            for xfer, grant in writer.open.items():
                if writer.is_alive and grant is not None and xfer not in writer.committed:
                    held = self.table.find(xfer)
                    assert held is not None, f"{xfer} writes after free"
                    assert (held.grant_id, held.blocks) == (grant.grant_id, grant.blocks)
                    assert all(self.pool.ref_count(block) == 1 for block in grant.blocks)

    @invariant()
    def no_block_is_lost_or_held_twice(self) -> None:
        in_grants = sum(self.table.blocks_by_state().values())
        in_sequences = sum(map(len, self.sequences))
        assert self.pool.num_used == in_grants + in_sequences

    def teardown(self) -> None:
        """After the storm every block comes back: by the answers to FENCE, or by the proof of death."""
        for writer in self.writers.values():
            if not writer.is_alive:
                self.perform(self.table.on_channel_dead(writer.peer))
        for _ in range(2):
            self.drain()
            self.now += 6.0
            self.perform(self.table.tick(self.now))
            for writer in self.living():
                for message in writer.from_receiver:
                    if isinstance(message, SendFence):
                        self.perform(self.table.on_writer_done(message.xfer, writer.peer))
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
