"""The ways that KV takes from prefill to decode, as settings of real engines in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engines.messages import Peers, PrefixHint, Target
from kvstore.blocks.prefix_keys import block_keys
from tests.cluster import TINY_CHAT
from tests.engine_pair import EnginePair

NUM_TOKENS = 24
BATCH = 48  # requests at a time
SMALL = {"model.max_model_len": "512", "kv.num_blocks": "64", "kv.host_cache_bytes": "64MiB"}
ROOMY = {"kv.num_blocks": "256"}  # decode workers: with few blocks there the prompts only wait


@dataclass(frozen=True)
class Way:
    """One layout. `is_shared`: a second prefill worker, write-back, and prefixes fetched from each other."""

    name: str
    protocol: str = "shm"
    flags: dict[str, str] = field(default_factory=dict)
    decode_flags: dict[str, str] = field(default_factory=dict)
    is_shared: bool = False


WAYS = (
    Way("shm", "shm"),
    Way("tcp", "tcp"),
    Way("rdma", "rdma"),
    Way("rdma, KV where it lies", "rdma", flags={"kv.direct": "on"}),
    Way("shm, write-back, fetching, tiers, few blocks", "shm", flags=SMALL, decode_flags=ROOMY, is_shared=True),
    Way("tcp, write-back, fetching, tiers, few blocks", "tcp", flags=SMALL, decode_flags=ROOMY, is_shared=True),
    Way("rdma, write-back, fetching, tiers, few blocks", "rdma", flags=SMALL, decode_flags=ROOMY, is_shared=True),
    Way(
        "rdma, KV where it lies, write-back, fetching, tiers, few blocks",
        "rdma",
        flags={**SMALL, "kv.direct": "on"},
        decode_flags=ROOMY,
        is_shared=True,
    ),
    Way(
        "1 rank to 2, write-back, fetching, tiers, few blocks",
        "shm",
        flags=SMALL,
        decode_flags={**ROOMY, "decode.tensor_parallel_size": "2"},
        is_shared=True,
    ),
    Way("2 ranks to 1", "tcp", flags={"prefill.tensor_parallel_size": "2"}),
    Way("1 rank to 2", "shm", flags={"decode.tensor_parallel_size": "2"}),
    Way("blocks of 16 to blocks of 32", "tcp", flags={"kv.block_size": "16"}, decode_flags={"kv.block_size": "32"}),
)


def monolithic(folder: Path, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Answers of one engine that does both, with no cache and no transfer."""
    pair = EnginePair(folder, TINY_CHAT, flags={"kv.enable_prefix_caching": "false"})
    try:
        return _answers(pair, prompts, lambda _: {"to": "decode", "mode": "local"})
    finally:
        pair.close()


def disaggregated(way: Way, folder: Path, prompts: Sequence[list[int]]) -> tuple[list[list[int]], dict[str, float]]:
    """Answers over `way`, and the counters of all its engines, summed. No block may be in use after it."""
    more = ("prefill2",) if way.is_shared else ()
    pair = EnginePair(
        folder, TINY_CHAT, protocol=way.protocol, flags=way.flags, decode_flags=way.decode_flags, more=more
    )
    try:
        if way.is_shared:
            _introduce(pair)
        answers = _answers(pair, prompts, lambda i: _where(pair, way, prompts[i], i))
        pair.run(lambda: pair.blocks_in_use() == {}, timeout_s=30)
        return answers, _counters(pair)
    finally:
        pair.close()


def _introduce(pair: EnginePair) -> None:
    caches = {name: Target(name, half.engine.address) for name, half in pair.halves.items() if name != "decode"}
    for name, half in pair.halves.items():
        others = [target for other, target in caches.items() if other != name]
        half.engine.core.handle(Peers([] if name == "decode" else [pair.target], others))


def _where(pair: EnginePair, way: Way, prompt: list[int], i: int) -> dict[str, object]:
    """Prompts go to the two prefill workers in turn, each with what the other one said that it keeps."""
    if not way.is_shared:
        return {}
    here, there = ("prefill", "prefill2") if i % 2 else ("prefill2", "prefill")
    kept = dict(pair.kept)
    keys = list(block_keys(prompt, (len(prompt) - 1) // 32, 32, salt=""))
    found = [kept[key] for key in keys if key in kept]
    hint = PrefixHint(pair.halves[there].engine.address, max(found)) if found else None
    return {"to": here, "prefix": hint}


def _answers(
    pair: EnginePair, prompts: Sequence[list[int]], where: Callable[[int], dict[str, object]]
) -> list[list[int]]:
    waiting = list(range(len(prompts)))[::-1]
    live: set[int] = set()
    answers: list[list[int]] = [[] for _ in prompts]
    limit_s = time.monotonic() + 600
    while waiting or live:
        assert time.monotonic() < limit_s, f"{len(waiting) + len(live)} prompts are not answered after 600 s"
        while waiting and len(live) < BATCH:
            i = waiting.pop()
            live.add(i)
            pair.add(f"r{i}", prompts[i], max_tokens=NUM_TOKENS, ignore_eos=True, **where(i))  # type: ignore[arg-type]
        pair.turn()
        for i in [i for i in live if any((f"r{i}", 0) in half.finished for half in pair.halves.values())]:
            live.discard(i)
            answers[i] = pair.output(f"r{i}")
            for half in pair.halves.values():
                half.tokens.pop((f"r{i}", 0), None)
    return answers


def _counters(pair: EnginePair) -> dict[str, float]:
    total: dict[str, float] = {}
    for half in pair.halves.values():
        for name, value in half.engine.core.stats().counters.items():
            total[name] = total.get(name, 0.0) + value
    return total
