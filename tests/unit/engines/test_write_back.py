"""Where decode workers write back to: pure choice over the caches there are."""

from __future__ import annotations

from engines.messages import Target
from engines.prefix_share.write_back import choose_cache
from kvstore.address import KVAddress


def cache(name: str, host: str) -> Target:
    return Target(name, KVAddress(incarnation=f"{name}-1", host_id=host))


HERE = [cache("p0", "h0"), cache("p1", "h0")]
ELSEWHERE = [cache("p2", "h1"), cache("p3", "h2")]


def chosen(targets: list[Target], rid: str = "r", source: str = "") -> str:
    return choose_cache(targets, rid=rid, own_host="h0", source=source).node


def test_another_host_outlives_ours() -> None:
    assert {chosen(HERE + ELSEWHERE, rid=f"r{i}") for i in range(50)} == {"p2", "p3"}


def test_another_host_is_better_than_the_worker_that_has_the_prompt() -> None:
    assert chosen([*HERE, ELSEWHERE[0]], source="p0-1") == "p2"


def test_whoever_has_the_prompt_lacks_only_the_answer() -> None:
    assert chosen(HERE, source="p1-1") == "p1"
    assert chosen(HERE + ELSEWHERE, source="p3-1") == "p3"


def test_a_request_stays_with_its_cache_and_requests_spread_over_all() -> None:
    first = {f"r{i}": chosen(HERE, rid=f"r{i}") for i in range(200)}
    assert all(chosen(HERE[::-1], rid=rid) == node for rid, node in first.items())
    assert 60 < sum(node == "p0" for node in first.values()) < 140


def test_a_new_cache_takes_some_requests_and_moves_no_others() -> None:
    more = [*HERE, cache("p4", "h0")]
    for i in range(200):
        before, after = chosen(HERE, rid=f"r{i}"), chosen(more, rid=f"r{i}")
        assert after in (before, "p4")
