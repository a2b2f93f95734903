from __future__ import annotations

import msgspec
import pytest

from kvstore.address import KVAddress
from kvstore.state.handles import MAX_SKEW_S, PrefixHandle, handle_name, sign, verify

SECRET, FORMER, OTHER = b"s" * 32, b"f" * 32, b"o" * 32
NAME = handle_name("compat", bytes(16))
HANDLE = PrefixHandle(
    name=NAME, num_blocks=3, num_tokens=96, address=KVAddress(incarnation="p-1", host_id="h"), expires_s=1000.0
)


def test_a_handle_is_read_as_it_was_signed() -> None:
    assert verify(NAME, *sign(HANDLE, SECRET), [SECRET], 900.0) == HANDLE


def test_a_handle_of_the_former_secret_is_read_while_that_is_accepted() -> None:
    assert verify(NAME, *sign(HANDLE, FORMER), [SECRET, FORMER], 900.0) == HANDLE


@pytest.mark.parametrize("fault", ["another secret", "other words", "another name", "expired", "no message"])
def test_nobody_is_sent_anywhere_by_a_handle_that_is_not_ours(fault: str) -> None:
    body, mac = sign(HANDLE, OTHER if fault == "another secret" else SECRET)
    name, now_s = NAME, 900.0
    if fault == "other words":
        evil = msgspec.structs.replace(HANDLE, address=KVAddress(incarnation="evil", host_id="h"))
        body = sign(evil, SECRET)[0]
    elif fault == "another name":
        name = handle_name("compat", b"x" * 16)
    elif fault == "expired":
        now_s = 1000.0 + MAX_SKEW_S + 1
    elif fault == "no message":
        body, mac = sign(msgspec.Raw(b"\xc1"), SECRET)  # type: ignore[arg-type]
    assert verify(name, body, mac, [SECRET], now_s) is None
