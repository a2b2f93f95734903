"""Messages between the two halves of a worker: the front (Celery, Redis, text) and the engine process (device, KV).

Length-prefixed msgpack over a socketpair, about one message each way per step. No torch here.

    front  --Add, Promote, Owner, Drop, Stop, Peers, Lease, Shutdown-->  engine
    front  <--Ready, Tokens, Granted, NoGrant, Incoming, Arrived, Pushed, Preempted, Kept, Failed, Stats--  engine

    life of a request, prefill worker (P) and decode worker (D); F = front, E = engine
      F(P)  claim        Add(mode=push) -> E(P)   RESERVE ~> E(D)   Incoming -> F(D)
      E(P)  Granted -> F(P)                       F(P) sends the Celery task decode(rid)
      E(P)  computes, pushes layer groups         Tokens (first token) -> F(P): append_batch
      E(P)  COMMIT ~> E(D)                        Arrived -> F(D): handoff(from, to)
      F(D)  Promote | Drop -> E(D)                HANDED | REFUSED ~> E(P): Pushed -> F(P)
      E(D)  steps                                 Tokens -> F(D): append_batch, ... fin
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from engines.params import SamplingParams
from kvstore.address import KVAddress
from kvstore.link_report import LinkReport
from kvstore.overdue import OverdueWriter
from kvstore.state.entries import PromptLogprobs, TokenLogprobs


class Target(msgspec.Struct, frozen=True, array_like=True):
    """A decode worker that may take a sequence, best first in `Add.targets`."""

    node: str
    address: KVAddress


class PrefixHint(msgspec.Struct, frozen=True, array_like=True):
    """Somebody keeps the first `num_blocks` blocks of a request's tokens; believed only when they have come."""

    address: KVAddress
    num_blocks: int


# ---------------------------------------------------------------- front -> engine
class Add(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Compute this request. `push`: prefill, then hand it to one of `targets`. `local`: keep it here (role `both`).

    Attributes:
        choices: output ids so far of each choice (all empty at the first attempt).
        deadline_s: seconds from now (the two processes share no wall clock assumption).
        reserve_full: reserve for prompt + max_tokens, and never preempt it again as long as another can be.
    """

    rid: str
    epoch: int
    token: str
    mode: Literal["push", "local"]
    prompt_ids: list[int]
    choices: list[list[int]]
    params: SamplingParams
    seed: int
    tenant: str = ""
    priority: int = 0
    deadline_s: float = 3600.0
    targets: list[Target] = []
    reserve_full: bool = False
    prefix: PrefixHint | None = None


class Promote(msgspec.Struct, frozen=True, tag=True):
    """Answer to `Arrived`: `handoff` said OK; the sequences join the next step under the new epoch and token."""

    rid: str
    xfer: str
    epoch: int
    token: str


class Owner(msgspec.Struct, frozen=True, tag=True):
    """Role both: from its first token on the request decodes here under this epoch and token. It may be moved."""

    rid: str
    epoch: int
    token: str


class Drop(msgspec.Struct, frozen=True, tag=True):
    """This worker has no business with the request any more: stop it, abort its transfers, free its blocks.

    With `xfer`, only that arrival (`handoff` was refused); else everything of `rid`. Safe to repeat.
    """

    rid: str
    xfer: str = ""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """The front found a stop string in choice `c`: it is finished, its later tokens are ignored."""

    rid: str
    c: int


class Peers(msgspec.Struct, frozen=True, tag=True):
    """Workers known now: `targets` may take sequences that look for a grant, best first; `caches` keep prefixes."""

    targets: list[Target]
    caches: list[Target] = []


class Lease(msgspec.Struct, frozen=True, tag=True):
    """Redis answered a renewal now. An engine that got none for 5 s stops stepping and keeps its KV."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Stop in order and exit 0."""


FrontMessage = Add | Promote | Owner | Drop | Stop | Peers | Lease | Shutdown


# ---------------------------------------------------------------- engine -> front
# Tokens depend on nothing but the request, as on all workers that say the same word; or they may depend on more.
Repeatability = Literal["exact", "exact-on-tiles", "best-effort"]


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine is up: weights loaded, region allocated, KV node listening."""

    pid: int
    address: KVAddress
    num_blocks: int
    block_size: int
    max_model_len: int
    dtype: str
    device: str
    visible_device: str
    num_threads: int
    load_s: float
    repeatability: Repeatability = "best-effort"


class TokenOut(msgspec.Struct, frozen=True, array_like=True):
    """Tokens of one choice from position `index` on; `finish` is "" while it goes on.

    `epoch` is that of the `Add` or `Promote` it was computed for: a request that left and came back knows its own.
    """

    rid: str
    c: int
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish: str = ""  # "stop" | "length"
    stop_reason: int | None = None
    cached_tokens: int = 0
    epoch: int = 0
    prompt_logprobs: PromptLogprobs | None = None  # with index 0, where they were asked for


class Tokens(msgspec.Struct, frozen=True, tag=True):
    """Output of one step. Also the first tokens, sampled at the end of a prefill."""

    step_id: int
    outs: list[TokenOut]


class Granted(msgspec.Struct, frozen=True, tag=True):
    """`node` promised blocks for `rid`; its compute starts now. `attempt` counts the nodes tried, from 1.

    Of a request that decodes here: blocks ran out, and it moves to that decode worker.
    """

    rid: str
    xfer: str
    node: str
    attempt: int


class NoGrant(msgspec.Struct, frozen=True, tag=True):
    """Nobody promised blocks within the engine's patience. The front sends fresh `Peers` or releases the request."""

    rid: str
    reason: str


class Incoming(msgspec.Struct, frozen=True, tag=True):
    """A prefill worker reserved blocks here for `rid`: its Celery task `decode(rid)` belongs to this arrival."""

    rid: str
    xfer: str


class Arrived(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """KV of `rid` is complete and verified. The front calls `handoff(rid, epoch, from_token, <own token>)`."""

    rid: str
    xfer: str
    epoch: int
    from_token: str
    prompt_ids: list[int]
    choices: list[list[int]]
    params: SamplingParams
    seed: int
    deadline_s: float
    num_bytes: int
    transfer_s: float
    cached_tokens: int = 0


class Pushed(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """End of a push: `handed`, `refused` (the receiver's handoff was not OK) or `failed` (no receiver took it).

    `granted_s`, `computed_s`: first grant, prompt computed; on this host's monotonic clock, 0 where it never was.
    """

    rid: str
    xfer: str
    outcome: Literal["handed", "refused", "failed"]
    reason: str = ""
    num_bytes: int = 0
    granted_s: float = 0.0
    computed_s: float = 0.0


class Stepped(msgspec.Struct, frozen=True, tag=True):
    """The first step of a sequence that was handed over is over. Times are on this host's monotonic clock.

    `computed_s` is the prefill worker's stamp, None where it runs on another host.
    """

    rid: str
    epoch: int
    verified_s: float
    began_s: float
    ended_s: float
    computed_s: float | None = None


class ArrivalLost(msgspec.Struct, frozen=True, tag=True):
    """An `Incoming` that will never become `Arrived` (aborted, writer dead): forget it, ack its Celery task."""

    rid: str
    xfer: str


class Preempted(msgspec.Struct, frozen=True, tag=True):
    """Blocks ran out and this request had to go; its blocks are free. The front calls `release`."""

    rid: str


class Kept(msgspec.Struct, frozen=True, tag=True):
    """Prefixes that this engine's cache has: (hash of a block, blocks up to its end). The front registers them."""

    marks: list[tuple[bytes, int]]


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine gave the request up. The front calls `finish(FAILED, code)`, or `release` if a retry may help."""

    rid: str
    code: str
    message: str
    is_retryable: bool = False


class Stats(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """State of the engine, sent every 0.5 s and after a change of load. Feeds heartbeat, metrics and routing."""

    blocks: dict[str, int]  # state -> blocks: free, used, leased, committed, quarantined, cached, swapped
    live: int
    waiting: int
    step_ms: float
    counters: dict[str, float] = {}
    overdue_writers: list[OverdueWriter] = []  # they leave a FENCE of this engine unanswered
    links: list[LinkReport] = []  # how fast this engine pushes, by the other side's host


EngineMessage = (
    Ready
    | Tokens
    | Granted
    | NoGrant
    | Incoming
    | Arrived
    | Stepped
    | ArrivalLost
    | Pushed
    | Preempted
    | Kept
    | Failed
    | Stats
)

FRAME_HEADER = struct.Struct("<I")
MAX_FRAME_BYTES = 64 << 20

encode = msgspec.msgpack.Encoder().encode
decode_front = msgspec.msgpack.Decoder(FrontMessage).decode
decode_engine = msgspec.msgpack.Decoder(EngineMessage).decode


def frame(message: FrontMessage | EngineMessage) -> bytes:
    """One message as bytes: little-endian uint32 length, then msgpack."""
    body = encode(message)
    return FRAME_HEADER.pack(len(body)) + body


class FrameReader:
    """Cuts a byte stream into frames. Owned by one thread."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, chunk: bytes) -> list[bytes]:
        """Frames completed by `chunk`.

        Raises:
            ValueError: a length over `MAX_FRAME_BYTES`; the stream is not ours.
        """
        self._buffer += chunk
        frames: list[bytes] = []
        offset = 0
        while len(self._buffer) - offset >= FRAME_HEADER.size:
            (length,) = FRAME_HEADER.unpack_from(self._buffer, offset)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"frame of {length} bytes, at most {MAX_FRAME_BYTES} expected")
            end = offset + FRAME_HEADER.size + length
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[offset + FRAME_HEADER.size : end]))
            offset = end
        del self._buffer[:offset]
        return frames
