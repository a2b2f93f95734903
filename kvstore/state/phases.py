"""The phases of a request, disjoint and without gaps: from its acceptance to the end of its last token. Pure.

    server   accept ... claim                                                                    last token published
    prefill worker      claim ... promise ... first token
    decode worker                             first token ... KV verified ... step begins ... ends
             |---queue----|--reserve--|--prefill--|--transfer--|--decode_wait--|--first_step--|-------decode-------|

Who measures: each span is a difference on ONE clock. `queue` is on the state server's; `reserve`, `prefill` on the
prefill worker's host; `transfer`, `decode_wait`, `first_step` on the decode worker's. Hosts share no clock, so a stamp
crosses over in two ways only: by the state server's clock as each worker knows it (`server_clock`), for the claim and
for the end of the first step; and by the monotonic clock of a host that both workers run on, for `transfer`. Where they
run on two hosts, `transfer` is what the state server's clock says, and then the sum closes by construction.

`total` is the state server's alone: its stamps of `accept` and of the end. So `closure`, sum minus total, is what the
clocks of two workers and the server disagree by. A request that was computed twice shows its last stay; `queue` then
holds all that was before its last claim. One that moved between decode workers has no closure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, TypeVar

import msgspec

PHASES: Final = {
    "queue": "Accepted until a worker claims it",
    "reserve": "Claimed until a decode worker has promised blocks",
    "prefill": "Blocks promised until the first token is sampled",
    "transfer": "First token sampled until the decode worker has verified the KV",
    "decode_wait": "KV verified until the decode step that holds the request begins",
    "first_step": "The first decode step of the request",
    "decode": "First decode step over until the last token is published",
}


class PrefillSpans(msgspec.Struct, frozen=True, array_like=True):
    """Measured by the worker that computed the prompt, under `epoch`.

    `reserve_ms` is None where nobody else had to promise anything: the worker decodes it itself. `computed_ms` is when
    the first token was sampled, on the state server's clock.
    """

    epoch: int
    prefill_ms: float
    computed_ms: float
    reserve_ms: float | None = None


class DecodeSpans(msgspec.Struct, frozen=True, array_like=True):
    """Measured by the decode worker, under `epoch`. `transfer_ms` is None where the prefill worker is on another host.

    `verified_ms`, `stepped_ms`: KV verified, first decode step over; on the state server's clock.
    """

    epoch: int
    decode_wait_ms: float
    first_step_ms: float
    verified_ms: float
    stepped_ms: float
    transfer_ms: float | None = None


Spans = PrefillSpans | DecodeSpans
T = TypeVar("T", PrefillSpans, DecodeSpans)
NAMES: Final = {PrefillSpans: "prefill", DecodeSpans: "decode"}
encode_spans: Final = msgspec.msgpack.Encoder().encode


def decode_spans(fields: Mapping[str, bytes]) -> tuple[PrefillSpans | None, DecodeSpans | None]:
    """The spans of a record's fields, by their names in `NAMES`; None where they are missing or of another version."""
    return _decoded(fields.get("prefill"), PrefillSpans), _decoded(fields.get("decode"), DecodeSpans)


def _decoded(packed: bytes | None, kind: type[T]) -> T | None:
    try:
        return None if packed is None else msgspec.msgpack.decode(packed, type=kind)
    except msgspec.DecodeError:
        return None


def phases_ms(
    stamps_ms: Mapping[str, float], prefill: PrefillSpans | None, decode: DecodeSpans | None
) -> dict[str, float]:
    """Those that are over, in order. `stamps_ms`: the server's; `queued`, `claimed` and `finished` are used."""
    found: dict[str, float | None] = {}
    if "queued" in stamps_ms and "claimed" in stamps_ms:
        found["queue"] = stamps_ms["claimed"] - stamps_ms["queued"]
    if decode is not None and prefill is not None and decode.epoch < prefill.epoch:
        decode = None  # of a stay before this one
    if prefill is not None:
        found |= {"reserve": prefill.reserve_ms, "prefill": prefill.prefill_ms}
    if decode is not None:
        found["transfer"] = decode.transfer_ms
        if decode.transfer_ms is None and prefill is not None:
            found["transfer"] = decode.verified_ms - prefill.computed_ms
        found |= {"decode_wait": decode.decode_wait_ms, "first_step": decode.first_step_ms}
    if "finished" in stamps_ms:
        if decode is not None:
            found["decode"] = stamps_ms["finished"] - decode.stepped_ms
        elif prefill is not None and prefill.reserve_ms is None:
            found["decode"] = stamps_ms["finished"] - prefill.computed_ms
    return {name: found_ms for name in PHASES if (found_ms := found.get(name)) is not None}


def closure_ms(
    stamps_ms: Mapping[str, float], prefill: PrefillSpans | None, decode: DecodeSpans | None
) -> float | None:
    """Sum of the phases minus `finished - queued`; None unless all are of one stay that ended."""
    if prefill is None or decode is None or decode.epoch != prefill.epoch + 1:
        return None
    phases = phases_ms(stamps_ms, prefill, decode)
    if phases.keys() != PHASES.keys():
        return None
    return sum(phases.values()) - (stamps_ms["finished"] - stamps_ms["queued"])
