"""Writer's side of a node: reservations, pushes and commits over the links to receivers.

    engine: reserve ── GrantReceived ── push, push, commit ── Handed | Refused | PushFailed
    wire:   RESERVE ▶ ◀ GRANT      (pages)    COMMIT ▶ ... ◀ HANDED | REFUSED        ◀ FENCE at any time: FENCED ▶

A transfer whose end was told to the engine is forgotten. Whatever comes for a transfer that is not known is answered
as for one closed for good: GRANT by ABORT, FENCE by FENCED.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvstore.address import KVAddress
from kvstore.native.pages import CellDigests
from kvstore.transport.checksum import TransferChecksum
from kvstore.transport.errors import BadFrame
from kvstore.transport.events import Event, FetchDeclined, GrantReceived, GrantRefused, SourceFree
from kvstore.transport.frames import (
    FETCH_PREFIX,
    Commit,
    FenceBody,
    FrameType,
    GrantBody,
    HandedBody,
    RefusedBody,
    Renew,
    Reserve,
    frame,
    parse_body,
)
from kvstore.transport.loop import Loop
from kvstore.transport.movers import SLICE_BYTES, Pairs
from kvstore.transport.settings import NodeContext
from kvstore.transport.transfers import Transfer, XferEvent, XferState, advance, outcome
from kvstore.transport.writer_link import LinkPhase, WriterLink

MAX_RENEW_XFERS = 1024
MAX_FIRST_FRAMES = 64
QUICK_BYTES = 256 << 10  # some 40 us of copying and hashing: what it costs to wake another thread, twice


@dataclass(slots=True, eq=False)
class _Closing:
    """A closed transfer of which something is under way: the receiver hears `reply`, then the engine `told`."""

    link: WriterLink
    xfer: str
    told: Event
    reply: bytes = b""


class WriterSide:
    """Owned by the `kv` thread."""

    def __init__(self, context: NodeContext, loop: Loop) -> None:
        self.engine_seen_s = context.clock()  # written by the engine thread at each of its calls
        self._context = context
        self._loop = loop
        self._links: dict[str, WriterLink] = {}  # by the receiver's incarnation
        self._link_of: dict[str, WriterLink] = {}  # by transfer
        self._backoffs: dict[str, tuple[float, float]] = {}  # receiver -> (until, length)
        self._closing: list[_Closing] = []
        self._next_renew_s = 0.0

    # ---------------------------------------------------------------- commands of the engine
    def reserve(self, target: KVAddress, transfer: Transfer) -> None:
        if transfer.xfer in self._link_of:
            return
        now = self._context.clock()
        self._loop.tick_by(transfer.deadline_s)
        link = self._links.get(target.incarnation)
        if link is None:
            until_s, _ = self._backoffs.get(target.incarnation, (0.0, 0.0))
            if now < until_s:
                self._context.emit(GrantRefused(transfer.xfer, "backoff"))
                return
            link = self._links[target.incarnation] = WriterLink(self._context, self, target)
            self._adopt(link, transfer)
            link.dial()
        else:
            self._adopt(link, transfer)
            if link.phase is LinkPhase.OPEN:
                self._send_reserve(link, transfer)

    def fetch(self, target: KVAddress, data: bytes) -> None:
        """Send a FETCH. It is a hint: where there is no way to `target` just now, nothing happens."""
        link = self._links.get(target.incarnation)
        if link is None:
            until_s, _ = self._backoffs.get(target.incarnation, (0.0, 0.0))
            if self._context.clock() < until_s:
                return
            link = self._links[target.incarnation] = WriterLink(self._context, self, target)
            link.first_frames.append(data)
            link.dial()
        elif link.phase is LinkPhase.OPEN:
            link.send(data)
        elif len(link.first_frames) < MAX_FIRST_FRAMES:
            link.first_frames.append(data)

    def is_quick(self, xfer: str, num_bytes: int) -> bool:
        """Whether `push` of so many bytes, or `commit`, is over at once: nothing is in front of it, or to be hashed."""
        link = self._link_of.get(xfer)
        return link is not None and num_bytes <= QUICK_BYTES and link.is_quick

    def push(self, xfer: str, pairs: Pairs, layer_lo: int, layer_hi: int) -> None:
        found = self._find(xfer, XferState.GRANTED)
        if found is not None:
            link, transfer = found
            link.jobs.append((transfer, self._push_job(link, transfer, pairs, layer_lo, layer_hi)))

    def commit(self, xfer: str, src_blocks: Sequence[int], num_tokens: int, state: bytes) -> None:
        found = self._find(xfer, XferState.GRANTED)
        if found is not None:
            link, transfer = found
            transfer.state = advance(transfer.state, XferEvent.COMMIT)
            transfer.num_hidden_bytes = max(transfer.num_bytes - link.num_queued_bytes, 0)
            link.jobs.append((transfer, self._commit_job(link, transfer, src_blocks, num_tokens, state)))

    def abandon(self, xfer: str) -> None:
        link = self._link_of.get(xfer)
        if link is None:
            # Closed already; but its last frame may still be on its way out.
            for closing in self._closing:
                if closing.xfer == xfer:
                    closing.told = SourceFree(xfer)
                    return
            self._context.emit(SourceFree(xfer))
            return
        self._close(link, link.transfers[xfer], XferEvent.ABANDONED, "abandoned", FrameType.ABORT)

    # ---------------------------------------------------------------- LinkOwner
    def watch(self, link: WriterLink) -> None:
        self._loop.add(link)

    def unwatch(self, link: WriterLink) -> None:
        self._loop.remove(link)

    def on_open(self, link: WriterLink) -> None:
        self._backoffs.pop(link.target.incarnation, None)
        self._context.counters[f"links_{link.protocol}"] += 1
        for transfer in list(link.transfers.values()):
            self._send_reserve(link, transfer)
        while link.first_frames:
            link.send(link.first_frames.pop(0))

    def on_lost(self, link: WriterLink, reason: str) -> None:
        """Nothing can be written over it any more. Its transfers fail; the next reserve may dial again."""
        times, target = self._context.times, link.target.incarnation
        del self._links[target]
        _, length_s = self._backoffs.get(target, (0.0, 0.0))
        length_s = min(max(2 * length_s, times.backoff_min_s), times.backoff_max_s)
        self._backoffs[target] = (self._context.clock() + length_s, length_s)
        if len(self._backoffs) > 1024:  # incarnations come and go for ever
            self._backoffs.pop(next(iter(self._backoffs)))
        for transfer in list(link.transfers.values()):
            self._close(link, transfer, XferEvent.LINK_LOST, reason)
        self._tell_closed()

    def on_frame(self, link: WriterLink, kind: FrameType, body: bytearray) -> None:
        if kind is FrameType.GRANT:
            self._on_grant(link, parse_body(kind, body, GrantBody))
        elif kind is FrameType.FENCE:
            self._on_fence(link, parse_body(kind, body, FenceBody))
        elif kind is FrameType.HANDED:
            handed = parse_body(kind, body, HandedBody)
            transfer = link.transfers.get(handed.xfer)
            if transfer is not None and transfer.state is XferState.COMMITTING and transfer.commit_frame:
                self._context.links.finished(link.target.host_id, link.protocol, transfer.num_bytes, handed.transfer_s)
                self._close(link, transfer, XferEvent.HANDED, "")
        elif kind is FrameType.REFUSED:
            refused = parse_body(kind, body, RefusedBody)
            transfer = link.transfers.get(refused.xfer)
            if refused.xfer.startswith(FETCH_PREFIX):
                self._context.emit(FetchDeclined(refused.xfer))
            elif transfer is not None:
                is_answered = transfer.state is XferState.RESERVING or bool(transfer.commit_frame)
                self._close(link, transfer, XferEvent.REFUSED, refused.reason, None if is_answered else FrameType.ABORT)
        else:
            raise BadFrame(reason="state", detail=f"{kind.name} from a receiver")

    # ---------------------------------------------------------------- the loop
    def work(self) -> bool:
        """One slice per link, so that no transfer holds up those to other receivers."""
        has_more = False
        for link in list(self._links.values()):
            has_more = link.work() or has_more
        if self._closing:
            self._tell_closed()
        return has_more

    def tick(self, now_s: float) -> bool:
        for link in list(self._links.values()):
            link.tick(now_s)
            for transfer in list(link.transfers.values()):
                self._check_time(link, transfer, now_s)
            for transfer in link.transfers.values():
                self._loop.tick_by(transfer.deadline_s)
        if now_s >= self._next_renew_s and now_s - self.engine_seen_s < self._context.times.engine_s:
            self._next_renew_s = now_s + self._context.times.renew_s
            for link in list(self._links.values()):
                self._renew(link)
        return bool(self._links)

    def stop(self) -> None:
        for link in list(self._links.values()):
            link.close("stopped")

    # ---------------------------------------------------------------- private
    def _adopt(self, link: WriterLink, transfer: Transfer) -> None:
        link.transfers[transfer.xfer] = transfer
        self._link_of[transfer.xfer] = link

    def _find(self, xfer: str, state: XferState) -> tuple[WriterLink, Transfer] | None:
        """None if it is over meanwhile: its end is in the engine's event queue."""
        link = self._link_of.get(xfer)
        if link is None:
            return None
        transfer = link.transfers[xfer]
        return (link, transfer) if transfer.state is state else None

    def _send_reserve(self, link: WriterLink, transfer: Transfer) -> None:
        t = transfer
        t.num_dst_blocks = link.num_dst_blocks(t)
        link.send(frame(FrameType.RESERVE, Reserve(t.xfer, t.rid, t.epoch, t.token, t.num_dst_blocks, t.group)))

    def _on_grant(self, link: WriterLink, grant: GrantBody) -> None:
        transfer = link.transfers.get(grant.xfer)
        if transfer is None or transfer.state is not XferState.RESERVING:
            if transfer is None:  # closed for good: never written to
                link.send(frame(FrameType.ABORT, FenceBody(grant.xfer, grant.grant_id)))
            return
        blocks = tuple(grant.blocks)
        is_sound = len(set(blocks)) == len(blocks) == transfer.num_dst_blocks
        if not is_sound or not all(block < link.num_peer_blocks for block in blocks):
            raise BadFrame(reason="bad_page", detail=f"GRANT of blocks {blocks[:8]} for {transfer.num_dst_blocks}")
        transfer.grant_id, transfer.serial, transfer.dst_blocks = grant.grant_id, grant.serial, array("q", blocks)
        if self._context.checksum:
            transfer.cells = CellDigests(len(blocks), self._context.region.num_layers)
        transfer.state = advance(transfer.state, XferEvent.GRANT)
        self._context.emit(GrantReceived(transfer.xfer, len(blocks)))

    def _on_fence(self, link: WriterLink, fence: FenceBody) -> None:
        transfer = link.transfers.get(fence.xfer)
        if transfer is not None:
            transfer.grant_id = transfer.grant_id or fence.grant_id
            self._close(link, transfer, XferEvent.FENCE, "fenced", FrameType.FENCED)
        elif not link.is_landing(fence.xfer):  # then the reply of its close is still to come
            link.send(frame(FrameType.FENCED, fence))  # in order behind whatever of it is half sent

    def _push_job(self, link: WriterLink, transfer: Transfer, pairs: Pairs, lo: int, hi: int) -> Iterator[None]:
        assert link.mover is not None
        yield from self._count(transfer, link.mover.move(transfer, pairs, lo, hi))

    def _count(self, transfer: Transfer, slices: Iterator[int]) -> Iterator[None]:
        for num_bytes in slices:
            transfer.num_bytes += num_bytes
            self._context.counters["sent_bytes"] += num_bytes
            yield

    def _commit_job(
        self, link: WriterLink, transfer: Transfer, src_blocks: Sequence[int], num_tokens: int, state: bytes
    ) -> Iterator[None]:
        """Runs when all pushes before it are complete: its place in the link's queue says so."""
        t, times, converter = transfer, self._context.times, link.converter
        num_filled = len(src_blocks)
        if converter is not None:
            yield from self._count(t, converter.complete(t, src_blocks, num_tokens))
            num_filled = converter.conversion.blocks_for(num_tokens)
        value = None
        if self._context.checksum:
            checksum = TransferChecksum(
                xfer=t.xfer, epoch=t.epoch, num_tokens=num_tokens, state=state, cells=t.cells
            )  # fmt: skip
            if converter is None:
                yield from checksum.update(self._context.region, src_blocks, SLICE_BYTES)
            else:
                assert t.cells is not None  # all of them were hashed when their parts were made
                checksum.update_digests(t.cells.packed(num_filled))
            value = checksum.value()
        assert link.mover is not None
        yield from link.mover.finish(t)
        body = Commit(
            t.xfer,
            t.grant_id,
            t.epoch,
            num_tokens,
            num_filled,
            value,
            state,
            t.num_bytes,
            t.busy_s,
        )  # fmt: skip
        t.commit_frame = frame(FrameType.COMMIT, body)
        self._context.counters["committed_bytes"] += t.num_bytes
        self._context.counters["hidden_bytes"] += t.num_hidden_bytes
        now = self._context.clock()
        t.next_commit_s, t.commit_ends_s = now + times.commit_every_s, now + times.commit_s
        link.send(t.commit_frame)

    def _check_time(self, link: WriterLink, transfer: Transfer, now_s: float) -> None:
        if transfer.state is XferState.CLOSED:
            return
        if transfer.state is XferState.RESERVING and now_s >= transfer.reserve_ends_s:
            self._close(link, transfer, XferEvent.GAVE_UP, "timeout", FrameType.ABORT)
        elif now_s >= transfer.deadline_s:
            self._close(link, transfer, XferEvent.GAVE_UP, "deadline", FrameType.ABORT)
        elif transfer.commit_frame and now_s >= transfer.commit_ends_s:
            self._close(link, transfer, XferEvent.GAVE_UP, "unanswered", FrameType.ABORT)
        elif transfer.commit_frame and now_s >= transfer.next_commit_s:
            transfer.next_commit_s = now_s + self._context.times.commit_every_s
            link.send(transfer.commit_frame)

    def _renew(self, link: WriterLink) -> None:
        xfers = [xfer for xfer, transfer in link.transfers.items() if transfer.state is not XferState.RESERVING]
        for start in range(0, len(xfers), MAX_RENEW_XFERS):
            link.send(frame(FrameType.RENEW, Renew(xfers[start : start + MAX_RENEW_XFERS])))

    def _close(
        self, link: WriterLink, transfer: Transfer, event: XferEvent, reason: str, reply: FrameType | None = None
    ) -> None:
        """The end of a transfer: no more reads of its source, the reply behind its last write, then the event."""
        told = outcome(transfer, event, reason, link.fault_detail)
        transfer.state = advance(transfer.state, event)
        del link.transfers[transfer.xfer], self._link_of[transfer.xfer]
        link.drop_jobs(transfer)
        answer = b"" if reply is None else frame(reply, FenceBody(transfer.xfer, transfer.grant_id or "-"))
        self._closing.append(_Closing(link, transfer.xfer, told, answer))
        self._tell_closed()

    def _tell_closed(self) -> None:
        for closing in list(self._closing):
            if closing.reply and not closing.link.is_landing(closing.xfer):
                reply, closing.reply = closing.reply, b""
                closing.link.send(reply)
        waiting = []
        for closing in self._closing:
            if closing.link.is_sending(closing.xfer):
                waiting.append(closing)
            else:
                self._context.emit(closing.told)
        self._closing = waiting
