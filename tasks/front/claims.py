"""Prompts: from a wake-up in hand to the engine.

hands --room?--> claim --Claimed--> read the log if it has ids --> Add --> engine
A claim is made when the engine has room, not when the message arrives: an unclaimed request is still anybody's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import msgspec

from engines.messages import Add, PrefixHint, Stop
from engines.params import SamplingParams
from kvstore.state.entries import TokenLogprobs
from kvstore.state.records import ClaimItem, RequestBody
from kvstore.state.replies import Busy, Claimed, Final, Gone
from tasks.front.calls import CallGroup
from tasks.front.context import FrontContext
from tasks.front.ends import RequestEnds, end_job
from tasks.front.hands import Hand, Hands
from tasks.front.peers import PeerTable
from tasks.front.ports import JobPort
from tasks.front.prefixes import Prefixes
from tasks.front.requests import Choice, LiveRequest, Phase

log = logging.getLogger(__name__)

CLAIMS_AT_ONCE = 8  # how many choices a request has is only known once it is claimed
SUSPECT_CRASHES = 2  # its workers died twice: it runs alone the third time
PINNED_AFTER_CLAIMS = 2  # whatever it was released for twice: now it reserves all it can ever need
History = list[tuple[list[int], list[TokenLogprobs] | None]]

_decode_params = msgspec.msgpack.Decoder(SamplingParams).decode


def has_been_preempted(claimed: Claimed) -> bool:
    """Whether a decode worker gave it up. The record's epoch tells: each former attempt raised it once by its claim,
    once by its end, and once more by each handoff in between; a crash may have come between those two.
    """
    num_handoffs = claimed.epoch - 2 * claimed.attempts
    return num_handoffs > claimed.crash_attempts


class Claims:
    """Output thread."""

    def __init__(self, ctx: FrontContext, ends: RequestEnds, peers: PeerTable, prefixes: Prefixes) -> None:
        self._ctx = ctx
        self._ends = ends
        self._peers = peers
        self._prefixes = prefixes
        self.hands = Hands()
        self._claim_calls: CallGroup[ClaimItem, Claimed | Busy | Final | Gone] = CallGroup(ctx.store.claim_each)
        self._claiming: dict[str, Hand] = {}
        self._alone: tuple[LiveRequest, Callable[[], None]] | None = None
        self._are_suspects_about = False  # the last request that we kept was one

    # ---------------------------------------------------------------- room
    @property
    def num_claiming(self) -> int:
        return len(self._claiming)

    def room(self) -> int:
        """Requests that may be claimed now."""
        ctx = self._ctx
        settings = ctx.settings
        if ctx.ready is None or ctx.is_draining or ctx.options.role == "decode" or self._has_suspect:
            return 0
        if ctx.options.role == "prefill":
            if not self._peers.targets:
                return 0  # nobody to hand it to: leave it to be claimed by who can
            limit = min(settings.prefill.max_batch_size, ctx.num_slots)
            return max(0, limit - self.num_claiming - len(ctx.live))
        limit = min(settings.decode.max_num_seqs, ctx.num_slots)
        num_seqs = sum(len(request.choices) for request in ctx.live.values())
        return max(0, limit - self.num_claiming - num_seqs)

    @property
    def _has_suspect(self) -> bool:
        return self._alone is not None or any(hand.is_suspect for hand in self._claiming.values())

    def submit(self, job: JobPort) -> None:
        """A wake-up. A second one for a request that is here already only shows it once more."""
        request = self._ctx.live.get(job.rid)
        if request is not None:
            request.jobs.append(job)
            job.accept(request.started_s)
        elif job.rid in self._claiming:
            self._claiming[job.rid].jobs.append(job)
        else:
            self.hands.add(job)

    def fill(self) -> None:
        """Claim what there is room for, several in one round trip."""
        while self.room() > 0 and len(self.hands):
            # Among suspects one by one: what is claimed with a suspect only goes back.
            num_claims = 1 if self._are_suspects_about else min(self.room(), len(self.hands), CLAIMS_AT_ONCE)
            for _ in range(num_claims):
                self._claim(self.hands.take_oldest())
            self._ctx.calls.run()
        self.start_alone()  # if the last thing that it waited for was an answer

    def start_alone(self) -> None:
        """The suspect's turn, once nothing else is here."""
        if self._alone is None:
            return
        request, start = self._alone
        if request.phase is Phase.ENDED:
            self._alone = None
        elif request.phase is Phase.ALONE and len(self._ctx.live) == 1 and not self._claiming:
            request.advance(Phase.COMPUTING)
            start()

    # ---------------------------------------------------------------- claim
    def _claim(self, hand: Hand) -> None:
        ctx, token = self._ctx, self._ctx.identity.next_token()
        self._claiming[hand.rid] = hand
        ctx.calls.gather(
            f"claim {hand.rid}",
            self._claim_calls,
            ClaimItem(hand.rid, token),
            partial(self._claimed, hand, token, ctx.identity.incarnation),
            lambda error: self._unreadable(hand, error),
        )

    def _unreadable(self, hand: Hand, error: Exception) -> None:
        self._claiming.pop(hand.rid, None)
        self._ends.unreadable(hand.rid, hand.jobs, error)  # type: ignore[arg-type]

    def _claimed(self, hand: Hand, token: str, incarnation: str, reply: Claimed | Busy | Final | Gone) -> None:
        ctx = self._ctx
        if not isinstance(reply, Claimed):
            self._claiming.pop(hand.rid, None)
            for job in hand.jobs:
                if isinstance(reply, Busy):
                    job.succeed("busy")
                else:
                    end_job(job, reply)
            return
        ctx.hub.send_turns(reply.turns)
        if incarnation != ctx.identity.incarnation:  # the engine died while the call was out
            self._give_back(hand, reply.epoch, token, "the engine process died")
            return
        if self._has_suspect:  # claimed with it: whoever is here when it kills the engine counts as suspect, too
            self._give_back(hand, reply.epoch, token, "another request must run alone")
            return
        hand.is_suspect = self._are_suspects_about = reply.crash_attempts >= SUSPECT_CRASHES
        if not any(reply.n):
            self._begin(hand, token, incarnation, reply, [([], None)] * len(reply.n))
            return
        has_logprobs = _decode_params(reply.body.params).logprobs is not None
        ctx.calls.do(
            f"read the log of {hand.rid}",
            lambda: self._read_history(hand.rid, len(reply.n), has_logprobs=has_logprobs),
            partial(self._begin, hand, token, incarnation, reply),
            lambda error: self._unreadable(hand, error),
        )

    def _read_history(self, rid: str, k: int, *, has_logprobs: bool) -> History:
        store = self._ctx.store
        if not has_logprobs:
            return [(ids, None) for ids in store.read_ids(rid, k)]
        history: History = []
        for c in range(k):
            entries = store.read_log(rid, c, 0).entries
            ids = [token_id for entry in entries for token_id in entry.token_ids]
            known = all(entry.logprobs is not None for entry in entries)
            history.append((ids, [lp for entry in entries for lp in entry.logprobs or ()] if known else None))
        return history

    def _give_back(self, hand: Hand, epoch: int, token: str, reason: str) -> None:
        self._claiming.pop(hand.rid, None)
        self._ends.give_back(hand.rid, epoch, token)
        for job in hand.jobs:
            job.retry(reason)

    def _begin(self, hand: Hand, token: str, incarnation: str, claimed: Claimed, history: History) -> None:
        ctx, body = self._ctx, claimed.body
        if incarnation != ctx.identity.incarnation:
            self._give_back(hand, claimed.epoch, token, "the engine process died")
            return
        self._claiming.pop(hand.rid, None)
        params = _decode_params(body.params)
        choices = [Choice(ctx.tokenizer, params, c) for c in range(body.k)]
        for choice, (ids, logprobs), fin in zip(choices, history, claimed.fin, strict=True):
            choice.restore(ids, logprobs)
            choice.cursor = len(ids)
            choice.is_fin_published = fin
        now = ctx.clock()
        is_local = ctx.options.role == "both"
        request = LiveRequest(
            rid=hand.rid,
            epoch=claimed.epoch,
            token=token,
            mode="local" if is_local else "push",
            phase=Phase.ALONE if hand.is_suspect else Phase.COMPUTING,
            choices=choices,
            wake_n=claimed.wake_n,
            deadline_s=now + claimed.remaining_s,
            started_s=now,
            engine_epoch=claimed.epoch,
            attempts=claimed.attempts,
            claimed_s=ctx.server_clock.local_s(claimed.claimed_ms, at_most_s=now),
            jobs=hand.jobs,
        )
        ctx.live[hand.rid] = request
        for job in hand.jobs:
            job.accept(now)
        start = partial(self._add, request, claimed, params)
        if request.phase is Phase.ALONE:
            log.warning("%s lost its workers %d times: it runs alone", hand.rid, claimed.crash_attempts)
            self._alone = (request, start)
            self.start_alone()
        else:
            start()

    def _add(self, request: LiveRequest, claimed: Claimed, params: SamplingParams) -> None:
        ctx, body = self._ctx, claimed.body
        targets = self._peers.targets
        if request.mode == "push" and self._peers.take_order_if_new():
            ctx.link.send(self._peers.message())
        ctx.link.send(
            Add(
                rid=request.rid,
                epoch=request.epoch,
                token=request.token,
                mode="local" if request.mode == "local" else "push",
                prompt_ids=body.prompt_ids,
                choices=[choice.ids for choice in request.choices],
                params=params,
                seed=body.seed,
                tenant=body.tenant,
                priority=body.priority,
                deadline_s=max(request.deadline_s - ctx.clock(), 0.0),
                targets=targets if request.mode == "push" else [],
                reserve_full=claimed.attempts > PINNED_AFTER_CLAIMS or has_been_preempted(claimed),
                prefix=self._find_prefix(request, body),
            )
        )
        self._stop_finished(request)
        if any(choice.is_unpublished() for choice in request.choices):
            ctx.dirty.add(request)

    def _find_prefix(self, request: LiveRequest, body: RequestBody) -> PrefixHint | None:
        """Of the prompt and, after a recovery, of what was generated: there a checkpoint may be."""
        ids = body.prompt_ids + (request.choices[0].ids if len(request.choices) == 1 else [])
        return self._prefixes.find(ids, body.tenant) if self._prefixes.is_wanted(len(ids)) else None

    def _stop_finished(self, request: LiveRequest) -> None:
        """The engine knows eos and lengths; that a stop string has ended a choice only we know."""
        for choice in request.choices:
            if choice.is_done:
                self._ctx.link.send(Stop(request.rid, choice.index))

    # ---------------------------------------------------------------- ends
    def cancel(self, rid: str) -> list[JobPort]:
        """Forget a wake-up that is not claimed. Returns its tasks."""
        hand = self.hands.remove(rid)
        return [] if hand is None else hand.jobs

    def requeue_hands(self) -> None:
        """Draining, or no engine: somebody else may take them, under the same ids."""
        for hand in self.hands.take_all():
            for job in hand.jobs:
                job.requeue()
