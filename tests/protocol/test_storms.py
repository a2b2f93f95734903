"""Storms over the protocol: in memory, and with every call going to the real functions on a real server.

`CELERIAC_STORMS=N` runs N of each instead of the few of a usual test run, from the seed `CELERIAC_FIRST_SEED` on.
Random storms are no proof: run them nightly, with new seeds.
"""

from __future__ import annotations

import os
from functools import partial

import pytest

from kvstore.state import EmbeddedValkey
from tests.protocol.real_redis import RealRedis
from tests.protocol.run import run_storms

NUM_STORMS = int(os.environ.get("CELERIAC_STORMS", "0"))
FIRST_SEED = int(os.environ.get("CELERIAC_FIRST_SEED", "710000"))
DUP_AND_FORK = """  elseif index < rec.n then
    reply = {'DUP', rec.n}
  elseif a[i + 6] ~= rec.hash then
    reply = {'FORK'}
"""


def test_no_storm_over_the_model_breaks_a_promise() -> None:
    totals = run_storms(FIRST_SEED, NUM_STORMS or 200)

    assert not totals.found, totals.texts


def test_no_storm_over_the_real_functions_breaks_a_promise(valkey_server: EmbeddedValkey) -> None:
    totals = run_storms(FIRST_SEED, NUM_STORMS or 40, make_redis=partial(RealRedis, url=valkey_server.url))

    assert not totals.found, totals.texts
    assert totals.stats["end FINISHED"] > 0


def test_burst_of_500_is_worked_off_with_few_wasted_wake_ups() -> None:
    totals = run_storms(0, 1, kind="backlog")

    assert not totals.found, totals.texts


@pytest.mark.parametrize(
    ("mutation", "caught_by"),
    [
        ("no_index_check", "CLIENT_WRONG_TOKEN"),
        ("gateway_no_dedup", "CLIENT_GAP_OR_REPEAT"),
        ("commit_early", "WRITE_AFTER_REUSE"),
        ("no_takeover", "NO_END_IN_TIME"),
        ("final_not_final", "FINAL_STATE_CHANGED"),
    ],
)
def test_broken_rule_is_caught(mutation: str, caught_by: str) -> None:
    """The storms can see: each of these rules, left out, breaks a promise within a few storms."""
    totals = run_storms(0, 60, mutate=mutation, stop_at=1)

    assert totals.found[caught_by], totals.texts


@pytest.mark.parametrize(
    ("rule", "instead", "caught_by"),
    [
        (DUP_AND_FORK, "", "LOG_BROKEN"),
        ("elseif a[i + 6] ~= rec.hash then", "elseif false then", "CLIENT_WRONG_TOKEN"),
        ("take_over(ctx, rec)\n    end\n  end", "look_at(ctx, rec, grace)\n    end\n  end", "NO_END_IN_TIME"),
        ("elseif ctx.now < grace then", "elseif false then", "TAKEOVER_WITHOUT_CAUSE"),
        ("if crashes >= MAX_CRASHES then", "if false then", "NO_END_IN_TIME"),
        ("if FINAL[rec.state] then return nil, final_reply(rec) end\n", "", "FINAL_STATE_CHANGED"),
    ],
)
def test_bug_planted_in_the_real_functions_is_caught(
    valkey_server: EmbeddedValkey, rule: str, instead: str, caught_by: str
) -> None:
    make_redis = partial(RealRedis, url=valkey_server.url, break_rule=(rule, instead))

    totals = run_storms(0, 300, stop_at=1, make_redis=make_redis)

    assert totals.found[caught_by], totals.texts
