"""Prefixes: what this worker keeps is filed with its beat; a prompt is looked up where a peer may keep its start."""

from __future__ import annotations

from typing import Any

import pytest

import configs
from engines import messages
from kvstore.address import KVAddress
from kvstore.blocks.prefix_keys import block_keys
from kvstore.errors import StateUnavailable
from kvstore.state.handles import PrefixHandle, handle_name
from tasks.front.prefixes import lookup_ends
from tests.unit.tasks.front_rig import Rig, beat, claimed

SECRET = b"s" * 32
PEER = KVAddress(incarnation="p1-1", host_id="h")
PROMPT = list(range(3, 163))  # ten blocks of 16
KEYS = list(block_keys(PROMPT, 10, 16, salt="t"))


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "secrets", lambda _: (SECRET,))


def rig(prompt: list[int], **answers: Any) -> Rig:
    reply = claimed()
    object.__setattr__(reply.body, "prompt_ids", prompt)
    made = Rig(claim=reply, workers=[beat(), beat("p1@h", "prefill")], heartbeat=None, **answers)
    made.parts.peers.refresh([beat(), beat("p1@h", "prefill")])
    return made


def handle(num_blocks: int) -> PrefixHandle:
    name = handle_name("", KEYS[num_blocks - 1])
    return PrefixHandle(name=name, num_blocks=num_blocks, num_tokens=num_blocks * 16, address=PEER, expires_s=9e9)


def added(made: Rig) -> messages.Add:
    made.wake()
    (add,) = made.heard()
    assert isinstance(add, messages.Add)
    return add


def test_a_prompt_is_added_with_the_longest_prefix_that_a_peer_keeps() -> None:
    made = rig(PROMPT, find_handle=handle(8))
    made.parts.prefixes.num_keepers = 1
    assert added(made).prefix == messages.PrefixHint(PEER, 8)
    ((names, secrets, _),) = made.store.called("find_handle")
    assert names[:2] == [handle_name("", KEYS[8]), handle_name("", KEYS[7])]  # the last token is computed anyway
    assert secrets == (SECRET,)


@pytest.mark.parametrize("why", ["nobody keeps any", "a short prompt"])
def test_nothing_is_looked_up_in_vain(why: str) -> None:
    made = rig(PROMPT[:64] if why == "a short prompt" else PROMPT, find_handle=None)
    made.parts.prefixes.num_keepers = 0 if why == "nobody keeps any" else 1
    assert added(made).prefix is None
    assert made.store.called("find_handle") == []


def test_a_state_server_that_is_away_delays_nothing() -> None:
    made = rig(PROMPT, find_handle=StateUnavailable(command="x", reason="timeout", detail=""))
    made.parts.prefixes.num_keepers = 1
    assert added(made).prefix is None


def test_what_the_engine_keeps_goes_out_with_the_next_beat() -> None:
    made = rig(PROMPT, put_handles=None)
    made.says(messages.Kept([(KEYS[3], 4), (KEYS[9], 10)]))
    assert made.store.called("put_handles") == []
    made.parts.registry.turn(free_hands=0, num_waiting=0)
    ((handles, secret),) = made.store.called("put_handles")
    assert [(h.name, h.num_blocks, h.num_tokens) for h in handles] == [
        (handle_name("", KEYS[3]), 4, 64),
        (handle_name("", KEYS[9]), 10, 160),
    ]
    assert secret == SECRET


def test_lookups_are_few_and_longest_first() -> None:
    assert lookup_ends(6) == [6, 5, 4]
    assert lookup_ends(3) == []
    ends = lookup_ends(2000)
    assert ends[:2] == [2000, 1999]
    assert ends[-3:] == [16, 8, 4]
    assert len(ends) < 80
