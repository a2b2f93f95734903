"""Two bounced nodes that push to each other through few slots, with copies, messages and faults in any order.

Real are `BouncedNode`, its pools and its books; the nodes beneath and the copies are small models in virtual time.
After every step no slot is lost or of two transfers, and a transfer that arrives holds what its writer had. In the end,
without further faults, every transfer ends and every slot and block is free: nobody has locked anybody up.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engines.device_kv.bounced_node import BouncedNode
from engines.device_kv.slot_pool import SlotPool
from kvstore.address import KVAddress
from kvstore.blocks import BlockPool, OutOfBlocks
from kvstore.transport import (
    Arrived,
    BlocksFree,
    Event,
    GrantReceived,
    GrantRefused,
    Handed,
    PushFailed,
    Refused,
    ReserveRequested,
    SourceFree,
)

NUM_LAYERS, NUM_BLOCKS, NUM_SLOTS, LARGEST = 2, 24, 9, 3
NAMES = ("a", "b")
Cell = tuple[str, int, int]  # what a layer of a block holds: of which transfer, place, layer


class Lane:
    """Jobs run when the test says so."""

    def __init__(self) -> None:
        self.jobs: deque[Callable[[], None]] = deque()

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def start(self) -> None: ...
    def stop(self) -> None: ...


class Memory:
    """`Copies` between two dicts: (block, layer) -> what it holds."""

    def __init__(self) -> None:
        self.device: dict[tuple[int, int], Cell] = {}
        self.slots: dict[tuple[int, int], Cell] = {}

    def gate(self) -> None:
        return None

    def save(self, gate: object, pairs: list[tuple[int, int]], lo: int, hi: int) -> None:  # noqa: ARG002
        for block, slot in pairs:
            for layer in range(lo, hi):
                self.slots[slot, layer] = self.device[block, layer]

    def load(self, gate: object, pairs: list[tuple[int, int]]) -> None:  # noqa: ARG002
        for slot, block in pairs:
            for layer in range(NUM_LAYERS):
                self.device[block, layer] = self.slots[slot, layer]


@dataclass(eq=False)
class Link:
    """A transfer as the nodes beneath see it."""

    writer: str
    reader: str
    xfer: str
    num_slots: int
    state: str = "reserving"  # granted, arrived, over (at the writer)
    dst: list[int] = field(default_factory=list)
    is_pending: bool = False  # the reader's engine has not answered
    work: deque[Callable[[], None]] = field(default_factory=deque)  # pushes and the commit, in order


class Node:
    """What `BouncedNode` needs of a node. Events of the other end come through `net`."""

    num_layers, wake_fd = NUM_LAYERS, -1

    def __init__(self, name: str, net: Net, memory: Memory) -> None:
        self.name, self.net, self.memory = name, net, memory
        self.events: deque[Event] = deque()
        self.takes: Callable[[Event], bool] = lambda _: False

    def divert(self, takes: Callable[[Event], bool]) -> None:
        self.takes = takes

    def emit(self, event: Event) -> None:
        if not self.takes(event):
            self.events.append(event)

    def poll_events(self) -> list[Event]:
        events = list(self.events)
        self.events.clear()
        return events

    def reserve(self, target: KVAddress, xfer: str, *, num_blocks: int, **_: object) -> None:
        link = self.net.links[xfer] = Link(self.name, target.incarnation, xfer, num_blocks)
        link.is_pending = True
        self.net.nodes[link.reader].emit(ReserveRequested(xfer, "rid", 1, "t", num_blocks))

    def grant(self, request: ReserveRequested, blocks: list[int] | None, reason: str = "") -> None:
        link = self.net.links[request.xfer]
        assert link.is_pending, "answered twice"
        link.is_pending = False
        if blocks is None:
            if link.state == "reserving":
                link.state = "over"
                self.net.nodes[link.writer].emit(GrantRefused(link.xfer, reason))
        elif link.state == "over":
            self.emit(BlocksFree(tuple(blocks), link.xfer))
        else:
            link.dst, link.state = list(blocks), "granted"
            self.net.nodes[link.writer].emit(GrantReceived(link.xfer, len(blocks)))

    def push(self, xfer: str, pairs: list[tuple[int, int]], lo: int, hi: int) -> None:
        link = self.net.links[xfer]
        if link.state != "granted":
            return

        def move() -> None:
            there = self.net.memories[link.reader].slots
            for slot, place in pairs:
                for layer in range(lo, hi):
                    there[link.dst[place], layer] = self.memory.slots[slot, layer]

        link.work.append(move)

    def commit(self, xfer: str, *, src_blocks: list[int], num_tokens: int, state: bytes) -> None:
        link = self.net.links[xfer]
        if link.state != "granted":
            return
        assert len(src_blocks) == num_tokens

        def arrive() -> None:
            link.state = "arrived"
            event = Arrived(xfer, "rid", 1, "t", tuple(link.dst), num_tokens, state, 0, 0.0)
            self.net.nodes[link.reader].emit(event)

        link.work.append(arrive)

    def abandon(self, xfer: str) -> None:
        link = self.net.links.get(xfer)
        if link is not None and link.state in ("reserving", "granted"):
            self.net.close(link)
        self.emit(SourceFree(xfer))

    def settle(self, xfer: str, handed: bool) -> None:
        link = self.net.links[xfer]
        assert link.state == "arrived"
        link.state = "over"
        self.net.nodes[link.writer].emit(Handed(xfer) if handed else Refused(xfer, "handoff"))
        if not handed:
            self.emit(BlocksFree(tuple(link.dst), xfer))

    def check_invariants(self) -> None: ...


@dataclass
class Net:
    nodes: dict[str, Node] = field(default_factory=dict)
    memories: dict[str, Memory] = field(default_factory=dict)
    links: dict[str, Link] = field(default_factory=dict)

    def close(self, link: Link) -> None:
        """No more reads and writes of it; then the reader's blocks are free, by the writer's word."""
        link.work.clear()
        link.state = "over"
        if link.dst:
            self.nodes[link.reader].emit(BlocksFree(tuple(link.dst), link.xfer))


@dataclass
class Engine:
    """Both sides of hand-offs, as `HandoffWriter` and `HandoffReader` keep their blocks."""

    name: str
    node: BouncedNode
    memory: Memory
    lanes: list[Lane]
    pool: BlockPool = field(default_factory=lambda: BlockPool(NUM_BLOCKS))
    sources: dict[str, list[int]] = field(default_factory=dict)
    granted: dict[str, list[int]] = field(default_factory=dict)
    arrived: list[str] = field(default_factory=list)
    lingering: set[str] = field(default_factory=set)
    num_handed: int = 0

    def reserve(self, xfer: str, target: str, num_blocks: int) -> None:
        try:
            blocks = self.pool.allocate(num_blocks)
        except OutOfBlocks:
            return
        for place, block in enumerate(blocks):
            for layer in range(NUM_LAYERS):
                self.memory.device[block, layer] = (xfer, place, layer)
        self.sources[xfer] = blocks
        address: Any = type("Address", (), {"incarnation": target})
        self.node.reserve(address, xfer, rid="r", epoch=1, token="t", num_blocks=num_blocks, deadline_s=1.0)

    def poll(self, is_generous: Callable[[], bool]) -> None:
        for event in self.node.poll_events():
            self._on(event, is_generous)

    def _on(self, event: Event, is_generous: Callable[[], bool]) -> None:
        match event:
            case ReserveRequested(xfer=xfer, num_blocks=num_blocks):
                try:
                    blocks = self.pool.allocate(num_blocks) if is_generous() else None
                except OutOfBlocks:
                    blocks = None
                if blocks:
                    self.granted[xfer] = blocks
                self.node.grant(event, blocks, "no_space")
            case GrantReceived(xfer) if xfer in self.sources and xfer not in self.lingering:
                blocks = self.sources[xfer]
                for layer in range(NUM_LAYERS):
                    self.node.push(xfer, [(b, place) for place, b in enumerate(blocks)], layer, layer + 1)
                self.node.commit(xfer, src_blocks=blocks, num_tokens=len(blocks), state=b"")
            case Arrived(xfer=xfer):
                assert list(event.blocks) == self.granted[xfer]
                held = [self.memory.device[b, layer] for b in event.blocks for layer in range(NUM_LAYERS)]
                wanted = [(xfer, place, layer) for place in range(len(event.blocks)) for layer in range(NUM_LAYERS)]
                assert held == wanted, f"{xfer} arrived with {held}"
                self.arrived.append(xfer)
            case BlocksFree(xfer=xfer):
                assert list(event.blocks) == self.granted.pop(xfer)
                self.arrived = [name for name in self.arrived if name != xfer]
                self.pool.free(list(event.blocks))
            case Handed() | Refused() | PushFailed() | GrantRefused() | SourceFree() if event.xfer in self.sources:
                self.num_handed += isinstance(event, Handed)
                self.lingering.discard(event.xfer)
                blocks = self.sources.pop(event.xfer)
                for block in blocks:
                    for layer in range(NUM_LAYERS):
                        self.memory.device[block, layer] = ("overwritten", block, layer)
                self.pool.free(blocks)

    def settle(self, index: int, *, is_handed: bool) -> None:
        xfer = self.arrived.pop(index % len(self.arrived))
        self.node.settle(xfer, is_handed)
        if is_handed:
            self.pool.free(self.granted.pop(xfer))  # its sequence ends at once


class TwoNodes(RuleBasedStateMachine):
    @initialize()
    def start(self) -> None:
        self.net, self.engines, self.count = Net(), {}, 0
        for name in NAMES:
            memory, lanes = Memory(), [Lane(), Lane()]
            lower = self.net.nodes[name] = Node(name, self.net, memory)
            self.net.memories[name] = memory
            makers = iter(lanes)
            slots = SlotPool(NUM_SLOTS, max_per_transfer=LARGEST)
            port: Any = lower
            node = BouncedNode(port, slots, memory, block_size=1, make_lane=lambda *_, makers=makers: next(makers))
            self.engines[name] = Engine(name, node, memory, lanes)

    @rule(writer=st.sampled_from(NAMES), num_blocks=st.integers(1, LARGEST))
    def reserve(self, writer: str, num_blocks: int) -> None:
        self.count += 1
        self.engines[writer].reserve(f"{writer}:{self.count}", NAMES[writer == "a"], num_blocks)

    @rule(name=st.sampled_from(NAMES), answers=st.lists(st.booleans(), min_size=1, max_size=4))
    def poll(self, name: str, answers: list[bool]) -> None:
        more = iter(answers)
        self.engines[name].poll(lambda: next(more, True))

    @rule(name=st.sampled_from(NAMES), lane=st.integers(0, 1))
    def copy(self, name: str, lane: int) -> None:
        jobs = self.engines[name].lanes[lane].jobs
        if jobs:
            jobs.popleft()()

    @rule(index=st.integers(0, 99))
    def move(self, index: int) -> None:
        """The `kv` thread of a writer does one thing."""
        busy = [link for link in self.net.links.values() if link.work]
        if busy:
            busy[index % len(busy)].work.popleft()()

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, 99), is_handed=st.booleans())
    def settle(self, name: str, index: int, is_handed: bool) -> None:
        if self.engines[name].arrived:
            self.engines[name].settle(index, is_handed=is_handed)

    @rule(name=st.sampled_from(NAMES), index=st.integers(0, 99))
    def abandon(self, name: str, index: int) -> None:
        engine = self.engines[name]
        live = [xfer for xfer in engine.sources if xfer not in engine.lingering]
        if live:
            xfer = live[index % len(live)]
            engine.lingering.add(xfer)
            engine.node.abandon(xfer)

    @rule(index=st.integers(0, 99))
    def fail(self, index: int) -> None:
        """A link breaks, or a fence comes: the transfer fails at its writer."""
        granted = [link for link in self.net.links.values() if link.state == "granted"]
        if granted:
            link = granted[index % len(granted)]
            self.net.close(link)
            self.net.nodes[link.writer].emit(PushFailed(link.xfer, "fenced"))

    @invariant()
    def every_slot_and_block_is_somebodys(self) -> None:
        for engine in getattr(self, "engines", {}).values():
            engine.node.check_invariants()
            engine.pool.check_invariants()
            held = sum(map(len, engine.sources.values())) + sum(map(len, engine.granted.values()))
            assert engine.pool.num_free + held == NUM_BLOCKS

    def teardown(self) -> None:
        """Without faults everything that was promised gets through."""
        if not getattr(self, "engines", None):
            return
        for _ in range(400):
            for engine in self.engines.values():
                engine.poll(lambda: True)
                for lane in engine.lanes:
                    while lane.jobs:
                        lane.jobs.popleft()()
                while engine.arrived:
                    engine.settle(0, is_handed=True)
            for link in self.net.links.values():
                while link.work:
                    link.work.popleft()()
        for engine in self.engines.values():
            assert not engine.sources, f"{engine.name} still waits for {list(engine.sources)}"
            assert not engine.granted
            assert engine.pool.num_free == NUM_BLOCKS
            assert engine.node._slots.num_free == NUM_SLOTS


TestTwoNodes = TwoNodes.TestCase
TestTwoNodes.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
