"""From the functions' answers (lists of bytes and integers) to the types of `replies`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvstore.errors import BadRecord, StateError
from kvstore.state.records import record_from
from kvstore.state.replies import (
    At,
    Busy,
    Claimed,
    Dup,
    Final,
    Fork,
    Gap,
    Gone,
    HandedOff,
    Ok,
    Stale,
    Turn,
)
from kvstore.state.transitions import RequestState


def code_of(reply: Any) -> str:
    """The first word of a reply: OK, GONE, FINAL, ..."""
    code: bytes = reply[0]
    return code.decode()


def common(rid: str, reply: Any) -> Gone | Final | Stale:
    """GONE, FINAL or STALE.

    Raises:
        BadRecord: the record is unreadable.
        StateError: another word: the library is not ours.
    """
    code = code_of(reply)
    if code == "GONE":
        return Gone()
    if code == "FINAL":
        return Final(state_of(reply[1]), reply[2].decode())
    if code == "STALE":
        return Stale(int(reply[1]), state_of(reply[2]))
    if code == "BADREC":
        raise BadRecord(rid=rid, why=reply[1].decode())
    raise StateError(f"unknown reply {reply!r} for request {rid}; expected one that this version of the protocol knows")


def claim_reply(rid: str, reply: Any) -> Claimed | Busy | Final | Gone:
    """Raises as `common`."""
    if code_of(reply) == "BUSY":
        return Busy(state_of(reply[1]))
    if code_of(reply) != "OK":
        return no_stale(rid, common(rid, reply))
    record = record_from(rid, reply[2])
    return Claimed(
        epoch=record.epoch,
        n=record.n,
        attempts=record.attempts,
        crash_attempts=record.crash_attempts,
        wake_n=record.wake_n,
        body=record.body,
        remaining_s=int(reply[1]) / 1000,
        turns=turns_of(reply[3]),
        fin=record.fin,
        claimed_ms=record.stamps.get("claimed", 0.0),
    )


def handoff_reply(rid: str, reply: Any) -> HandedOff | Stale | Final | Gone:
    """Raises as `common`."""
    if code_of(reply) != "OK":
        return common(rid, reply)
    return HandedOff(int(reply[1]), counts_of(reply[2]), flags_of(reply[3]))


def item_reply(rid: str, reply: Any) -> Gap | Dup | Fork | Stale | Final | Gone:
    """The reply to one item of a batch: a bad record is `Gone`, so that it harms no other item."""
    match code_of(reply):
        case "GAP":
            return Gap(int(reply[1]))
        case "DUP":
            return Dup(int(reply[1]))
        case "FORK":
            return Fork()
        case "BADREC":
            return Gone(bad_record=reply[1].decode())
        case _:
            return common(rid, reply)


def refill_reply(rid: str, reply: Any) -> Ok | At | Final | Gone:
    match code_of(reply):
        case "OK":
            return Ok()
        case "AT":
            return At(int(reply[1]))
        case _:
            return no_stale(rid, common(rid, reply))


def only_gone(rid: str, reply: Any) -> Gone:
    """For functions that answer in any state. Raises as `common`."""
    verdict = common(rid, reply)
    if not isinstance(verdict, Gone):
        raise StateError(
            f"{verdict} for request {rid} from a function that answers in any state: the library is not ours"
        )
    return verdict


def no_stale(rid: str, reply: Gone | Final | Stale) -> Gone | Final:
    """For functions that ask for no owner."""
    if isinstance(reply, Stale):
        raise StateError(f"STALE for request {rid} from a function that asks for no owner: the library is not ours")
    return reply


def turns_of(reply: Sequence[Any]) -> list[Turn]:
    return [Turn(rid.decode(), int(wake_n)) for rid, wake_n in reply]


def state_of(word: bytes) -> RequestState:
    return RequestState(word.decode())


def counts_of(reply: Sequence[Any]) -> list[int]:
    return [int(n) for n in reply]


def flags_of(reply: Sequence[Any]) -> list[bool]:
    return [bool(int(flag)) for flag in reply]
