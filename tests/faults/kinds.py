"""The faults of a storm. Each one turns a right session into what is sent, and says what may come of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import msgspec

from kvstore.transport.frames import DATA_HEADER, HEADER, Commit, FrameType, frame, parse_body
from tests.faults.peer import EPOCH, Session


class Outcome(Enum):
    NEVER = "never arrives"
    ONCE = "arrives once, right"
    EITHER = "arrives right, or not at all"


@dataclass(frozen=True)
class Fault:
    sent: bytes
    outcome: Outcome


Kind = Callable[[Session, random.Random], Fault]
PAYLOAD_START: Final = HEADER.size + DATA_HEADER.size


def flipped(data: bytes, rng: random.Random, *, start: int = 0) -> bytes:
    bit = rng.randrange(start * 8, len(data) * 8)
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bit_in_a_page(session: Session, rng: random.Random) -> Fault:
    pages = list(session.pages)
    index = rng.randrange(len(pages))
    pages[index] = flipped(pages[index], rng, start=PAYLOAD_START)
    return Fault(b"".join(pages) + session.commit, Outcome.NEVER)


def bit_in_a_header(session: Session, rng: random.Random) -> Fault:
    pages = list(session.pages)
    index = rng.randrange(len(pages))
    pages[index] = flipped(pages[index][:PAYLOAD_START], rng) + pages[index][PAYLOAD_START:]
    return Fault(b"".join(pages) + session.commit, Outcome.NEVER)


def bit_in_the_notice(session: Session, rng: random.Random) -> Fault:
    """In its counters of bytes and time nothing depends on a bit."""
    return Fault(b"".join(session.pages) + flipped(session.commit, rng), Outcome.EITHER)


def truncated(session: Session, rng: random.Random) -> Fault:
    return Fault(session.stream[: rng.randrange(len(session.stream))], Outcome.NEVER)


def stale_epoch_of_a_page(session: Session, rng: random.Random) -> Fault:
    pages = list(session.pages)
    index = rng.randrange(len(pages))
    page = bytearray(pages[index])
    page[HEADER.size + 8 : HEADER.size + 16] = (EPOCH - 1).to_bytes(8, "big")
    pages[index] = bytes(page)
    return Fault(b"".join(pages) + session.commit, Outcome.NEVER)


def stale_epoch_of_the_notice(session: Session, rng: random.Random) -> Fault:
    return Fault(b"".join(session.pages) + _commit(session, epoch=EPOCH + rng.choice((-1, 1))), Outcome.NEVER)


def another_token_count(session: Session, rng: random.Random) -> Fault:
    return Fault(b"".join(session.pages) + _commit(session, num_tokens=rng.randrange(1000, 2000)), Outcome.NEVER)


def page_after_the_notice(session: Session, rng: random.Random) -> Fault:
    """A late write into pages that are being checked, or are a sequence's."""
    late = flipped(rng.choice(session.pages), rng, start=PAYLOAD_START)
    return Fault(session.stream + late, Outcome.EITHER)


def page_after_the_end(session: Session, rng: random.Random) -> Fault:
    end = session.end(rng.choice((FrameType.ABORT, FrameType.FENCED)))
    return Fault(session.pages[0] + end + rng.choice(session.pages), Outcome.NEVER)


def notice_three_times(session: Session, rng: random.Random) -> Fault:  # noqa: ARG001  (a Kind)
    return Fault(session.stream + session.commit * 2, Outcome.ONCE)


def notice_before_the_last_page(session: Session, rng: random.Random) -> Fault:
    cut = rng.randrange(len(session.pages))
    sent = b"".join(session.pages[:cut]) + session.commit + b"".join(session.pages[cut:])
    return Fault(sent, Outcome.NEVER)


def notice_after_the_end(session: Session, rng: random.Random) -> Fault:  # noqa: ARG001  (a Kind)
    return Fault(b"".join(session.pages) + session.end(FrameType.ABORT) + session.commit, Outcome.NEVER)


def pages_in_any_order(session: Session, rng: random.Random) -> Fault:
    pages = list(session.pages)
    rng.shuffle(pages)
    return Fault(b"".join(pages) + session.commit, Outcome.ONCE)


def pages_twice(session: Session, rng: random.Random) -> Fault:
    pages = session.pages * 2
    rng.shuffle(pages)
    return Fault(b"".join(pages) + session.commit, Outcome.ONCE)


def page_again_and_different(session: Session, rng: random.Random) -> Fault:
    again = flipped(rng.choice(session.pages), rng, start=PAYLOAD_START)
    return Fault(b"".join(session.pages) + again + session.commit, Outcome.NEVER)


def pages_swapped(session: Session, rng: random.Random) -> Fault:
    pages = list(session.pages)
    first, second = rng.sample(range(len(pages)), 2)
    one, two = pages[first], pages[second]
    pages[first] = one[:PAYLOAD_START] + two[PAYLOAD_START:]
    pages[second] = two[:PAYLOAD_START] + one[PAYLOAD_START:]
    return Fault(b"".join(pages) + session.commit, Outcome.NEVER)


def page_missing(session: Session, rng: random.Random) -> Fault:
    pages = list(session.pages)
    del pages[rng.randrange(len(pages))]
    return Fault(b"".join(pages) + session.commit, Outcome.NEVER)


def page_of_another_grant(session: Session, rng: random.Random) -> Fault:
    pages = list(session.pages)
    page = bytearray(pages[-1])
    serial = session.grant.serial + rng.choice((-1, 1, 1000))
    page[HEADER.size : HEADER.size + 8] = serial.to_bytes(8, "big")
    pages[-1] = bytes(page)
    return Fault(b"".join(pages) + session.commit, Outcome.NEVER)


def noise(session: Session, rng: random.Random) -> Fault:
    return Fault(session.pages[0] + rng.randbytes(rng.randrange(12, 400)), Outcome.NEVER)


KINDS: Final[tuple[Kind, ...]] = (
    bit_in_a_page,
    bit_in_a_header,
    bit_in_the_notice,
    truncated,
    stale_epoch_of_a_page,
    stale_epoch_of_the_notice,
    another_token_count,
    page_after_the_notice,
    page_after_the_end,
    notice_three_times,
    notice_before_the_last_page,
    notice_after_the_end,
    pages_in_any_order,
    pages_twice,
    page_again_and_different,
    pages_swapped,
    page_missing,
    page_of_another_grant,
    noise,
)


def _commit(session: Session, **changes: object) -> bytes:
    body = parse_body(FrameType.COMMIT, session.commit[HEADER.size :], Commit)
    return frame(FrameType.COMMIT, msgspec.structs.replace(body, **changes))
