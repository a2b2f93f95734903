"""Counting tokens of a call: prompts once, outputs of all choices."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Usage:
    """Counts so far. `completion` is per choice; `cached` per prompt, the most that any of its choices reports."""

    prompt_tokens: int
    completion: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        completion_tokens = sum(self.completion.values())
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }
