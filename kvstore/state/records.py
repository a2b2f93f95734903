"""What callers give to the state server, and the record as they get it back."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from kvstore.address import KVAddress
from kvstore.errors import BadRecord
from kvstore.overdue import OverdueWriter
from kvstore.state.phases import DecodeSpans, PrefillSpans, Spans, decode_spans
from kvstore.state.transitions import RequestState

_encode = msgspec.msgpack.Encoder().encode
_decode_ids = msgspec.msgpack.Decoder(list[int]).decode


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """A request to accept.

    Attributes:
        params: msgpack of `engines.params.SamplingParams`.
        body_hash: over the body as it came; the same id with another hash is a CONFLICT.
        meta: the gateway's own notes (kind of API, ...), opaque here.
        deadline_in_s: seconds from the moment the server accepts it.
    """

    rid: str
    model: str
    tenant: str
    priority: int
    deadline_in_s: float
    seed: int
    k: int
    params: bytes
    prompt_ids: list[int]
    gateway: str
    body_hash: str
    meta: bytes = b""


@dataclass(frozen=True, kw_only=True)
class RequestBody:
    """Everything a worker needs to compute a request; never changes."""

    rid: str
    model: str
    tenant: str
    priority: int
    seed: int
    k: int
    params: bytes
    prompt_ids: list[int]
    gateway: str
    meta: bytes


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record as `/v1/requests/{id}` shows it. Times in ms of the server's clock.

    Attributes:
        owners: owner token -> lease end.
        n, fin: per choice.
        stamps: queued, claimed, handed, first_token, finished; to the microsecond.
        prefill_spans, decode_spans: what the workers measured (`kvstore.state.phases`).
    """

    rid: str
    state: RequestState
    phase: str
    reason: str
    epoch: int
    owners: dict[str, int]
    attempts: int
    crash_attempts: int
    deadline_ms: int
    wake_n: int
    n: list[int]
    fin: list[bool]
    body: RequestBody
    stamps: dict[str, float] = field(default_factory=dict)
    prefill_spans: PrefillSpans | None = None
    decode_spans: DecodeSpans | None = None


@dataclass(frozen=True)
class AppendItem:
    """Tokens of one choice from `index` on, and its end if `fin` is given.

    Attributes:
        state: the caller's idea of the state, PREFILLING or DECODING; used when its newer epoch is adopted.
        prefix_hash, new_hash: over the ids before `index`, and over those up to `index + count`.
        tokens: msgpack TokenEntry; b"" when `count` is 0.
        fin: msgpack FinEntry, or None while the choice goes on.
    """

    rid: str
    epoch: int
    token: str
    state: str
    c: int
    index: int
    prefix_hash: int
    new_hash: int
    count: int
    tokens: bytes
    fin: bytes | None = None


@dataclass(frozen=True)
class ClaimItem:
    """A request to claim under `token`, which was never used before."""

    rid: str
    token: str


@dataclass(frozen=True)
class HandoffItem:
    """A request to take over from `from_token`, under `to_token`, which was never used before."""

    rid: str
    epoch: int
    from_token: str
    to_token: str


@dataclass(frozen=True)
class SpansItem:
    """What a worker measured of a request's phases."""

    rid: str
    spans: Spans


@dataclass(frozen=True)
class RenewItem:
    """A request held by this process: computing, waiting or pushing."""

    rid: str
    epoch: int
    token: str
    state: str


class WorkerBeat(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself every 0.5 s. Routing only: a beat that stops is never proof of a death."""

    incarnation: str
    node: str
    role: str
    model: str
    address: KVAddress
    compat: str = ""
    dtype: str = ""
    repeatability: str = "best-effort"  # or "exact", "exact-on-tiles": its tokens depend on nothing but the request
    num_blocks: int = 0
    free_blocks: int = 0
    live: int = 0
    max_num_seqs: int = 0
    waiting: int = 0
    free_hands: int = 0
    step_ms: float = 0.0
    draining: bool = False
    pid: int = 0
    engine_pids: list[int] = []
    host_id: str = ""
    blocks: dict[str, int] = {}
    counters: dict[str, float] = {}
    overdue_writers: list[OverdueWriter] = []


def accept_arguments(new: NewRequest) -> list[str | bytes | int]:
    """Arguments of the function `accept`, in its order."""
    return [
        new.rid,
        max(0, round(new.deadline_in_s * 1000)),
        new.seed,
        new.params,
        _encode(new.prompt_ids),
        new.tenant,
        new.priority,
        new.gateway,
        new.model,
        new.k,
        new.body_hash,
        new.meta,
    ]


def record_from(rid: str, flat: list[bytes]) -> Record:
    """A record out of the flat list of a HGETALL.

    Raises:
        BadRecord: a field is missing or unreadable.
    """
    fields = dict(zip((name.decode() for name in flat[::2]), flat[1::2], strict=True))
    prefill_spans, decode_spans_ = decode_spans({name[2:]: v for name, v in fields.items() if name.startswith("m:")})
    try:
        k = int(fields["k"])
        return Record(
            rid=rid,
            state=RequestState(fields["state"].decode()),
            phase=fields["phase"].decode(),
            reason=fields["reason"].decode(),
            epoch=int(fields["epoch"]),
            owners=_owners(fields["owners"].decode()),
            attempts=int(fields["attempts"]),
            crash_attempts=int(fields["crash_attempts"]),
            deadline_ms=int(float(fields["deadline"])),
            wake_n=int(fields["wake_n"]),
            n=[int(fields[f"n:{c}"]) for c in range(k)],
            fin=[f"f:{c}" in fields for c in range(k)],
            body=RequestBody(
                rid=rid,
                model=fields["model"].decode(),
                tenant=fields["tenant"].decode(),
                priority=int(fields["priority"]),
                seed=int(fields["seed"]),
                k=k,
                params=fields["params"],
                prompt_ids=_decode_ids(fields["prompt_ids"]),
                gateway=fields["gateway"].decode(),
                meta=fields["meta"],
            ),
            stamps={name[2:]: float(value) for name, value in fields.items() if name.startswith("t:")},
            prefill_spans=prefill_spans,
            decode_spans=decode_spans_,
        )
    except (KeyError, ValueError, msgspec.DecodeError) as error:
        raise BadRecord(rid=rid, why=f"{type(error).__name__}: {error}") from error


def _owners(packed: str) -> dict[str, int]:
    return {token: int(end) for token, end in (part.split("=") for part in packed.split(",") if part)}
