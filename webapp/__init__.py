"""The gateway: HTTP and SSE in front, records and feeds behind.

Owns the OpenAI-compatible surface, admission, the streams of waiting clients and the gateway's metrics. It talks to the
rest only through `kvstore.state` and through wake-ups (`tasks.wakeups`); it must not know engines beyond the tokenizer
and sampling parameters, and never imports torch, transformers or redis.
"""

from __future__ import annotations

__all__: list[str] = []
