"""Prompts without end: conversations that share openings, so that caches, write-back and fetching have work."""

from __future__ import annotations

import json
import random

from tests.cluster import TINY_CHAT

MAX_PROMPT = 380


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    """`count` prompts of 20 to `MAX_PROMPT` tokens. Two of five begin like one before; the rest are new."""
    rng = random.Random(seed)
    real = [json.loads(line)["prompt_ids"] for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]
    made: list[list[int]] = []
    for _ in range(count):
        kind = rng.random()
        if made and kind < 0.4:
            opening = made[rng.randrange(max(0, len(made) - 40), len(made))]
            prompt = opening[: rng.randrange(1, len(opening) + 1)] + rng.choices(range(3, 2500), k=rng.randint(1, 60))
        elif kind < 0.6:
            prompt = list(rng.choice(real))
        else:
            prompt = rng.choices(range(3, 2500), k=rng.randint(20, MAX_PROMPT))
        made.append(prompt[:MAX_PROMPT])
    return made
