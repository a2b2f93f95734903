"""The load of the fault tests: 20 streams, half greedy, half seeded, and the claim that a fault changed nothing."""

from __future__ import annotations

from typing import Any

from tests.cluster import Stream

NUM_STREAMS = 20
MAX_TOKENS = 240


def bodies(max_tokens: int = MAX_TOKENS, num_streams: int = NUM_STREAMS) -> list[dict[str, Any]]:
    """Long enough to be in the middle when the fault comes."""
    common = {"max_tokens": max_tokens, "ignore_eos": True}
    stories = [
        f"<|im_start|>user\nCount from {i} to 90.<|im_end|>\n<|im_start|>assistant\n" for i in range(num_streams)
    ]
    return [
        {"prompt": text, "temperature": 0, **common}
        if i % 2
        else {"prompt": text, "temperature": 0.9, "top_p": 0.95, "seed": 1000 + i, **common}
        for i, text in enumerate(stories)
    ]


def assert_same(undisturbed: list[Stream], disturbed: list[Stream]) -> None:
    """The same tokens and text, no gap, no repeat, one end."""
    for before, after in zip(undisturbed, disturbed, strict=True):
        assert after.errors == []
        assert after.num_done == 1
        assert after.token_ids == before.token_ids
        assert after.texts == before.texts
        assert after.finish_reasons == before.finish_reasons
