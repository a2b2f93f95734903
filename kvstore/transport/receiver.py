"""Receiver's side of a node: grants, pages that land, checksums, hand-over. Decisions are `GrantTable`'s.

wire:   RESERVE ▶ ...      ◀ GRANT   (pages)   COMMIT ▶  verify   ...       ◀ HANDED | REFUSED
engine: ReserveRequested, grant()                        Arrived, settle()                  BlocksFree at any end
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kvstore.blocks import (
    Action,
    AskEngine,
    BlocksReleased,
    Delivered,
    Grant,
    GrantState,
    GrantTable,
    Reservation,
    SendFence,
    SendGrant,
    SendHanded,
    SendRefused,
    Verify,
)
from kvstore.native.pages import CellDigests
from kvstore.overdue import OverdueWriter
from kvstore.transport.checksum import TransferChecksum
from kvstore.transport.connection import Connection
from kvstore.transport.errors import BadFrame, HandshakeRefused
from kvstore.transport.events import Arrived, BlocksFree, FetchRequested, ReserveRequested
from kvstore.transport.frames import (
    Commit,
    DataHeader,
    FenceBody,
    FetchBody,
    FrameType,
    GrantBody,
    HandedBody,
    RefusedBody,
    Renew,
    Reserve,
    frame,
    parse_body,
    parse_data_header,
    split,
)
from kvstore.transport.joint import PREFIX, JointGrants
from kvstore.transport.loop import Loop
from kvstore.transport.movers import LAST_SLICE_BYTES, SLICE_BYTES
from kvstore.transport.reader_link import ReaderLink, ReaderPhase
from kvstore.transport.settings import NodeContext

MAX_LINKS = 512
MAX_LINKS_PER_PEER = 16  # a writer has one; those before it may not have been noticed as dead yet


@dataclass(slots=True, eq=False)
class _Landing:
    """What a transfer sent so far. `layers`: per place of the grant, a bit for each layer that landed (tcp)."""

    link: ReaderLink  # that it comes over
    cells: CellDigests | None  # of what has landed and was hashed; None: all is hashed at COMMIT
    layers: dict[int, int] = field(default_factory=dict)
    unhashed: deque[DataHeader] = field(default_factory=deque)  # written by the peer (shm)
    commit: Commit | None = None
    is_tcp: bool = False
    landing_since_s: float = 0.0
    receive_s: float = 0.0  # from the header to the last byte, over all DATA frames

    @property
    def moving_s(self) -> float:
        """Time spent moving pages: receiving here (tcp), or copying at the writer, as its COMMIT says (shm)."""
        if self.is_tcp:
            return self.receive_s
        return self.commit.transfer_s if self.commit is not None else 0.0


class ReceiverSide:
    """Owned by the `kv` thread; `blocks_by_state` and `overdue` are snapshots for other threads."""

    def __init__(self, context: NodeContext, loop: Loop) -> None:
        self.table = GrantTable(context.incarnation, lease_s=context.times.grant_lease_s)
        self.blocks_by_state = self.table.blocks_by_state()
        self.overdue: tuple[OverdueWriter, ...] = ()
        self._context = context
        self._loop = loop
        self._links: dict[int, ReaderLink] = {}
        self._landings: dict[str, _Landing] = {}  # of grants in the table
        self._joint = JointGrants()
        self._verifying: deque[Iterator[None]] = deque()
        self._hashing: deque[Iterator[None]] = deque()
        self._serial = 0

    def accept(self, connection: Connection) -> None:
        """A new connection. Where there are too many, the stranger who has waited longest goes, else the new one."""
        if len(self._links) >= MAX_LINKS:
            self._context.reject("too_many_links", f"{MAX_LINKS} connections are open")
            strangers = (link for link in self._links.values() if link.phase is ReaderPhase.GREETING)
            oldest = next(strangers, None)  # they are in the order of their coming
            if oldest is None:
                connection.close()
                return
            oldest.close()
        self._serial += 1
        link = ReaderLink(self._context, self, connection, self._serial)
        link.unwatch = self._loop.remove
        self._links[link.serial] = link
        self._loop.add(link)

    # ---------------------------------------------------------------- answers of the engine
    def grant(self, xfer: str, blocks: list[int] | None, reason: str) -> None:
        group = self._joint.find(xfer)
        if group is None:
            self._answer(xfer, blocks, reason)
            return
        group.blocks = None if blocks is None else tuple(blocks)
        for member in list(group.members):
            if group.is_over:  # refused, or the first of them had gone before it could write
                self._answer(member, None, reason or "ended")
            else:
                self._answer(member, blocks, reason)

    def settle(self, xfer: str, is_handed: bool) -> None:
        group = self._joint.find(xfer)
        if group is not None:
            group.is_over, group.incomplete_since_s = True, None
        for one in [xfer] if group is None else list(group.members):
            self._perform(self.table.settle(one, is_handed=is_handed, now_s=self._context.clock()))

    def _answer(self, xfer: str, blocks: Sequence[int] | None, reason: str) -> None:
        taken = None if blocks is None else list(blocks)
        self._perform(self.table.answer(xfer, taken, self._context.clock(), reason=reason))
        if blocks is None:
            self._leave(xfer)

    def _leave(self, xfer: str) -> None:
        """A member of a group can write no more. With the last one the group's blocks are free."""
        group = self._joint.leave(xfer)
        if group is not None and group.blocks is not None:
            self._context.emit(BlocksFree(group.blocks, group.xfer))

    # ---------------------------------------------------------------- ReaderOwner
    def on_frame(self, link: ReaderLink, kind: FrameType, body: bytearray) -> None:
        now = self._context.clock()
        if kind is FrameType.RESERVE:
            reserve = parse_body(kind, body, Reserve)
            if not 1 <= reserve.num_blocks <= self._context.region.num_blocks:
                self._perform([SendRefused(link.serial, reserve.xfer, "too_large")])
                return
            self._on_reserve(link, reserve)
        elif kind is FrameType.COMMIT:
            commit = parse_body(kind, body, Commit)
            for action in self.table.on_commit(commit.xfer, commit.grant_id, link.serial):
                if isinstance(action, Verify):
                    grant = self.table.find(commit.xfer)
                    assert grant is not None
                    landing = self._landing(link, grant)
                    landing.commit, landing.is_tcp = commit, link.protocol == "tcp"
                self._perform_one(action)  # no block changes its state: a verdict comes before that
        elif kind is FrameType.PUSHED:
            self._on_pushed(link, parse_data_header(body))
        elif kind in (FrameType.ABORT, FrameType.FENCED):
            self._perform(self.table.on_writer_done(parse_body(kind, body, FenceBody).xfer, link.serial))
        elif kind is FrameType.RENEW:
            self.table.on_renew(parse_body(kind, body, Renew).xfers, link.serial, now)
        elif kind is FrameType.FETCH:
            fetch = parse_body(kind, body, FetchBody)
            if fetch.address.incarnation != link.peer:
                raise BadFrame(reason="state", detail=f"FETCH of {link.peer} for {fetch.address.incarnation}")
            self._context.emit(FetchRequested(fetch.fetch, link.serial, tuple(fetch.keys), fetch.first, fetch.address))
        else:
            raise BadFrame(reason="state", detail=f"{kind.name} from a writer")

    def decline(self, serial: int, fetch: str) -> None:
        """The engine's answer to `FetchRequested`, where it pushes nothing."""
        link = self._links.get(serial)
        if link is not None:
            link.send(frame(FrameType.REFUSED, RefusedBody(fetch, "not_here")))

    def _on_reserve(self, link: ReaderLink, reserve: Reserve) -> None:
        asked = Reservation(reserve.xfer, reserve.rid, reserve.epoch, reserve.token, reserve.num_blocks)
        fault, share, is_member = "", link.share, self._joint.of_member(reserve.xfer) is not None
        if reserve.xfer.startswith(PREFIX):
            fault = "duplicate"
        elif share is not None:
            asked = replace(asked, part=f"heads {share.dst_lo}..{share.dst_lo + share.num_heads}")
            fault = self._joint.join(reserve.group, asked, share) if reserve.group else "needs_group"
        if fault:
            self._perform([SendRefused(link.serial, reserve.xfer, fault)])
            return
        actions = self.table.on_reserve(asked, link.serial)
        self._perform(actions)
        if not is_member and any(isinstance(action, SendRefused) for action in actions):
            self._leave(reserve.xfer)

    def page_views(self, link: ReaderLink, header: DataHeader, num_bytes: int) -> list[memoryview]:
        """Bounds first: nothing is written but pages of a grant of this connection, before its COMMIT."""
        grant = self._granted(link, header, "tcp")
        if num_bytes != header.num_places * (header.layer_hi - header.layer_lo) * link.pages.layer_bytes:
            raise BadFrame(reason="length", detail=f"{num_bytes} bytes for {header}")
        last = header.first + header.num_places
        views = link.pages.views(grant.blocks[header.first : last], header.layer_lo, header.layer_hi)
        self._landing(link, grant).landing_since_s = self._context.clock()
        return views

    def _granted(self, link: ReaderLink, header: DataHeader, protocol: str) -> Grant:
        """The grant whose pages `header` names. Raises BadFrame: this peer may not write them, or not now."""
        region, grant = self._context.region, self.table.find_serial(header.serial)
        if link.protocol != protocol or grant is None or grant.peer != link.serial:
            raise BadFrame(reason="bad_page", detail=f"DATA for grant {header.serial}, which this peer does not hold")
        if grant.is_verifying or grant.state is GrantState.COMMITTED:
            raise BadFrame(reason="state", detail=f"DATA after COMMIT of {grant.reservation.xfer}")
        if header.epoch != grant.reservation.epoch:
            raise BadFrame(reason="stale_epoch", detail=f"epoch {header.epoch}, granted {grant.reservation.epoch}")
        last = header.first + header.num_places
        if header.num_places < 1 or last > len(grant.blocks):
            raise BadFrame(reason="bad_page", detail=f"places {header.first}..{last} of {len(grant.blocks)}")
        if not 0 <= header.layer_lo < header.layer_hi <= region.num_layers:
            raise BadFrame(reason="bad_page", detail=f"layers {header.layer_lo}..{header.layer_hi}")
        return grant

    def on_landed(self, link: ReaderLink, header: DataHeader) -> None:
        grant = self.table.find_serial(header.serial)
        if grant is None:
            return
        last = header.first + header.num_places
        link.pages.landed(grant.blocks[header.first : last], header.layer_lo, header.layer_hi)
        landing = self._landing(link, grant)
        landing.receive_s += self._context.clock() - landing.landing_since_s
        bits = (1 << header.layer_hi) - (1 << header.layer_lo)
        for place in range(header.first, last):
            landing.layers[place] = landing.layers.get(place, 0) | bits
        self._hash(grant, landing, header)

    def _on_pushed(self, link: ReaderLink, header: DataHeader) -> None:
        """The peer wrote these pages itself: hash them while it goes on. Late ones belong to a grant that is over."""
        grant = self.table.find_serial(header.serial)
        if grant is None or not self._context.checksum:
            return
        landing = self._landing(link, self._granted(link, header, "shm"))
        landing.unhashed.append(header)
        if len(landing.unhashed) == 1:
            self._hashing.append(self._hash_pushed(grant, landing))

    def admit(self, peer: str) -> None:
        """A peer has proven who it is. Raises HandshakeRefused: it has too many links."""
        if sum(link.peer == peer for link in self._links.values()) >= MAX_LINKS_PER_PEER:
            raise HandshakeRefused(reason="too_many_links", detail=f"{peer[:64]} has {MAX_LINKS_PER_PEER}")

    def on_unreachable(self, link: ReaderLink) -> None:
        self._perform(self.table.on_unreachable(link.serial, self._context.clock()))

    def on_closed(self, link: ReaderLink) -> None:
        """We closed the socket (tcp) or destroyed our agent (rdma), or the writer closed its end or is gone: proof."""
        self._links.pop(link.serial, None)
        self._perform(self.table.on_channel_dead(link.serial))

    # ---------------------------------------------------------------- the loop
    def work(self) -> bool:
        """One slice of one verification, or else of hashing what was pushed, the oldest first."""
        jobs = self._verifying or self._hashing
        if jobs:
            job = jobs.popleft()
            if next(job, StopIteration) is not StopIteration:
                jobs.append(job)
        return bool(self._verifying or self._hashing)

    def tick(self, now_s: float) -> bool:
        for link in list(self._links.values()):
            link.tick(now_s)
        self._perform(self.table.tick(now_s))
        for group in self._joint.stale(now_s - self._context.times.commit_s):
            self.settle(group.xfer, False)
        after_s = self._context.times.fence_kill_s
        self.overdue = tuple(self._overdue(grant) for grant in self.table.overdue(now_s, after_s=after_s))
        return bool(self._links) or self.table.next_due_s() is not None

    def stop(self) -> None:
        for link in list(self._links.values()):
            link.close()

    # ---------------------------------------------------------------- private
    def _perform(self, actions: list[Action]) -> None:
        self.blocks_by_state = self.table.blocks_by_state()  # before the engine hears of it
        for action in actions:
            self._perform_one(action)

    def _perform_one(self, action: Action) -> None:
        match action:
            case AskEngine(xfer):
                self._ask(xfer)
            case SendGrant(peer, xfer, grant_id, serial, blocks):
                self._send(peer, frame(FrameType.GRANT, GrantBody(xfer, grant_id, serial, list(blocks))))
                grant, granted = self.table.find(xfer), self._links.get(peer)
                if grant is not None and granted is not None:
                    self._landing(granted, grant)  # here, where nobody waits for it
            case SendRefused(peer, xfer, reason):
                self._send(peer, frame(FrameType.REFUSED, RefusedBody(xfer, reason)))
            case SendHanded(peer, xfer):
                landing = self._landings.pop(xfer, None)
                self._joint.leave(xfer)
                self._send(peer, frame(FrameType.HANDED, HandedBody(xfer, landing.moving_s if landing else 0.0)))
            case SendFence(peer, xfer, grant_id):
                self._send(peer, frame(FrameType.FENCE, FenceBody(xfer, grant_id)))
            case Verify(xfer):
                self._verifying.append(self._verify(xfer))
            case Delivered(xfer):
                self._deliver(xfer)
            case BlocksReleased(xfer, blocks):
                self._landings.pop(xfer, None)
                self._release(xfer, blocks)

    def _ask(self, xfer: str) -> None:
        """The engine, or for all but the first of a group what the engine has said."""
        group, r = self._joint.of_member(xfer), self.table.reservation(xfer)
        if group is not None and group.blocks is not None:
            self._answer(xfer, group.blocks, "")
        elif group is None or not group.is_asked:
            if group is not None:
                group.is_asked = True
            name = xfer if group is None else group.xfer
            self._context.emit(ReserveRequested(name, r.rid, r.epoch, r.token, r.num_blocks))

    def _release(self, xfer: str, blocks: tuple[int, ...]) -> None:
        """Blocks of a group are free with the last of its members; the loss of one cancels the others."""
        group = self._joint.of_member(xfer)
        if group is None:
            self._context.emit(BlocksFree(blocks, xfer))
            return
        self._leave(xfer)
        for member in list(group.members):
            self._perform(self.table.settle(member, is_handed=False, now_s=self._context.clock()))

    def _send(self, peer: int, data: bytes) -> None:
        link = self._links.get(peer)
        if link is not None:
            link.send(data)

    def _deliver(self, xfer: str) -> None:
        grant, landing = self.table.find(xfer), self._landings[xfer]
        commit = landing.commit
        assert grant is not None and commit is not None
        r, num_bytes, moving_s = grant.reservation, commit.num_bytes, landing.moving_s
        self._context.counters["arrived_bytes"] += num_bytes
        group, layout = self._joint.of_member(xfer), self._context.layout
        if group is not None:
            assert layout is not None  # or no link could hold a part of the heads
            group.members[xfer].is_delivered = True
            landings = [self._landings[member] for member, m in group.members.items() if m.is_delivered]
            commits = [one.commit for one in landings if one.commit is not None]
            if group.is_over or any((c.num_tokens, c.state) != (commit.num_tokens, commit.state) for c in commits):
                self._perform(self.table.settle(xfer, is_handed=False, now_s=self._context.clock()))
                return
            if group.num_heads() < layout.num_heads:
                if group.incomplete_since_s is None:
                    group.incomplete_since_s = self._context.clock()
                return
            group.incomplete_since_s = None
            xfer, num_bytes = group.xfer, sum(c.num_bytes for c in commits)
            moving_s = max(one.moving_s for one in landings)
        tokens, state, now_s = commit.num_tokens, commit.state, self._context.clock()
        self._context.emit(
            Arrived(xfer, r.rid, r.epoch, r.token, grant.blocks, tokens, state, num_bytes, moving_s, now_s)
        )

    def _verify(self, xfer: str) -> Iterator[None]:
        grant, landing = self.table.find(xfer), self._landings[xfer]
        assert grant is not None and landing.commit is not None
        commit = landing.commit
        fault = self._fault_of(grant, landing, commit)
        if not fault and self._context.checksum:
            yield from self._hash_pushed(grant, landing)
            checksum = TransferChecksum(
                xfer=xfer, epoch=commit.epoch, num_tokens=commit.num_tokens, state=commit.state, cells=landing.cells
            )
            link, blocks = landing.link, grant.blocks[: commit.num_blocks]
            if link.share is not None:
                held = (runs for block in blocks for runs in link.pages.held(block))
                yield from checksum.update_parts(held, SLICE_BYTES)
            else:
                yield from checksum.update(self._context.region, blocks, SLICE_BYTES)
            fault = "" if checksum.value() == commit.checksum else "checksum"
        if fault:
            self._context.reject(fault, f"COMMIT of {xfer}")
        self._perform(self.table.verdict(xfer, is_good=not fault, reason=fault))

    def _hash_pushed(self, grant: Grant, landing: _Landing) -> Iterator[None]:
        """All that waits, pausing after each slice. What is pushed twice is hashed again: the last time counts."""
        while landing.unhashed:
            header = landing.unhashed.popleft()
            run_bytes = (header.layer_hi - header.layer_lo) * self._context.region.layer_bytes
            for part in split(header, max(1, SLICE_BYTES // run_bytes)):
                self._hash(grant, landing, part)
                if part.num_places * run_bytes >= LAST_SLICE_BYTES:
                    yield

    def _hash(self, grant: Grant, landing: _Landing, header: DataHeader) -> None:
        if landing.cells is None:
            return
        region, first = self._context.region, header.first
        region.ops.hash(
            region.pages,
            grant.blocks[first : first + header.num_places],
            first=first,
            lo=header.layer_lo,
            hi=header.layer_hi,
            cells=landing.cells,
        )

    def _landing(self, link: ReaderLink, grant: Grant) -> _Landing:
        found = self._landings.get(grant.reservation.xfer)
        if found is None:
            has_cells = self._context.checksum and link.share is None
            cells = CellDigests(len(grant.blocks), self._context.region.num_layers) if has_cells else None
            found = self._landings[grant.reservation.xfer] = _Landing(link, cells)
        return found

    def _fault_of(self, grant: Grant, landing: _Landing, commit: Commit) -> str:
        if commit.epoch != grant.reservation.epoch:
            return "stale_epoch"
        if not 1 <= commit.num_blocks <= min(len(grant.blocks), commit.num_tokens):
            return "incomplete"
        whole = (1 << self._context.region.num_layers) - 1
        if landing.is_tcp and any(landing.layers.get(place) != whole for place in range(commit.num_blocks)):
            return "incomplete"
        return ""

    def _overdue(self, grant: Grant) -> OverdueWriter:
        link = self._links.get(grant.peer)
        pid, peer = (link.pid, link.peer) if link is not None else (0, "")
        return OverdueWriter(xfer=grant.reservation.xfer, peer=peer, pid=pid, num_blocks=len(grant.blocks))

    @property
    def num_open_links(self) -> int:
        return sum(link.phase is ReaderPhase.OPEN for link in self._links.values())
