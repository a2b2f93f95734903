"""What an engine says of itself: blocks by state, load, step time, totals. Sent as `Stats`, twice a second."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from engines.messages import Stats
from engines.scheduler.plan import StepPlan

if TYPE_CHECKING:
    from engines.step_rows import SampledTokens
    from kvstore.blocks import BlockPool, PrefixCache
    from kvstore.tiers import TieredStore
    from kvstore.transport import KVPort

SMOOTHING = 0.1  # weight of the newest step in `step_ms`
COUNTERS = (
    "steps",
    "prompt_tokens",
    "padding_tokens",  # what padding each batch of prompts to its longest would have computed in addition
    "output_tokens",
    "busy_s",
    "draft_steps",
    "draft_tokens",
    "kept_draft_tokens",
)


class EngineFigures:
    """Owned by the engine thread. Totals only grow; a restarted engine begins at 0."""

    def __init__(
        self, pool: BlockPool, node: KVPort, prefix_cache: PrefixCache | None, tiers: TieredStore | None
    ) -> None:
        self._pool = pool
        self._kv = node
        self._cache = prefix_cache
        self._tiers = tiers
        self._step_ms = 0.0
        self._totals = dict.fromkeys(COUNTERS, 0.0)

    def step_done(self, plan: StepPlan, elapsed_s: float) -> None:
        elapsed_ms = elapsed_s * 1e3
        self._step_ms = elapsed_ms if not self._step_ms else self._step_ms + SMOOTHING * (elapsed_ms - self._step_ms)
        self._totals["steps"] += 1
        self._totals["busy_s"] += elapsed_s
        self._totals["padding_tokens"] += plan.num_padding_tokens
        self._totals["prompt_tokens"] += sum(i.num_known_tokens for i in plan.scheduled if i.num_known_tokens > 1)

    def sampled(self, plan: StepPlan, sampled: list[SampledTokens]) -> None:
        """Guesses, how many were right, and in how many steps (one per sequence and step) there were some."""
        guessed = {item.sequence.seq_id: len(item.draft) for item in plan.scheduled if item.draft}
        if guessed:
            found = [item for item in sampled if item.sequence.seq_id in guessed]
            self._totals["draft_steps"] += len(guessed)
            self._totals["draft_tokens"] += sum(guessed.values())
            self._totals["kept_draft_tokens"] += sum(len(item.token_ids) - 1 for item in found)

    def tokens_out(self, num_tokens: int) -> None:
        self._totals["output_tokens"] += num_tokens

    def stats(self, *, live: int, waiting: int, num_swapped_pages: int, more: dict[str, float]) -> Stats:
        grants = self._kv.grants()
        blocks = {
            "free": self._pool.num_free,
            "cached": self._pool.num_cached,
            "used": self._pool.num_used - sum(grants.values()),
            "swapped": num_swapped_pages,  # in host memory, beyond the region
            **{state.lower(): count for state, count in grants.items()},
        }
        return Stats(
            blocks=blocks,
            live=live,
            waiting=waiting,
            step_ms=self._step_ms,
            counters=self._counters() | more,
            overdue_writers=list(self._kv.overdue_writers()),
            links=list(self._kv.links()),
        )

    def _counters(self) -> dict[str, float]:
        counters = dict(self._totals)
        counters |= {f"kv_{name}": total for name, total in self._kv.counters().items()}
        counters |= {f"kv_reject_{reason}": float(count) for reason, count in self._kv.rejects().items()}
        if self._cache is not None:
            stats = self._cache.stats
            counters["prefix_query_tokens"] = float(stats.query_tokens)
            counters["prefix_hit_tokens"] = float(stats.hit_tokens)
            counters["prefix_evicted_blocks"] = float(stats.evicted_blocks)
        if self._tiers is not None:
            counters |= {f"tier_{name}_blocks": float(count) for name, count in asdict(self._tiers.stats).items()}
            counters["tier_host_blocks"] = float(self._tiers.num_host_blocks)
            counters["tier_disk_blocks"] = float(self._tiers.num_disk_blocks)
        return counters
