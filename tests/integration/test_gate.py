"""The exactness gate: fp32, greedy, through HTTP, over every transport and role, equal to `transformers.generate`.

models/tiny-chat/prompts.jsonl holds what `transformers.generate` gave for its prompts (models/tiny-chat/README.md); for
the random checkpoints it is asked here.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import make_checkpoint, reference_model
from tests.cluster import TINY_CHAT, read_streams, running_cluster
from tests.contract.transport_helpers import needs_nixl
from tests.devices import needs_gpu

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]
ON_GPUS = ("--prefill", "1", "--decode", "1", "--set", "prefill.device=cuda", "--set", "decode.device=cuda")
LAYOUTS = {
    "shm": (("--prefill", "1", "--decode", "1"), {"CELERIAC_TRANSFER__PROTOCOL": "shm"}),
    "tcp": (("--prefill", "1", "--decode", "1"), {"CELERIAC_TRANSFER__PROTOCOL": "tcp"}),
    "rdma": (("--prefill", "1", "--decode", "1"), {"CELERIAC_TRANSFER__PROTOCOL": "rdma"}),
    "bounced": (
        ("--prefill", "1", "--decode", "1"),
        {"CELERIAC_TRANSFER__PROTOCOL": "shm", "CELERIAC_KV__BOUNCE_BYTES": "48MiB"},
    ),
    "direct": (
        ("--prefill", "1", "--decode", "1"),
        {"CELERIAC_TRANSFER__PROTOCOL": "rdma", "CELERIAC_KV__DIRECT": "on"},
    ),
    "both": (("--both", "1"), {}),
    "cuda": (ON_GPUS, {}),
    "direct cuda": (ON_GPUS, {"CELERIAC_TRANSFER__PROTOCOL": "rdma"}),
    "speculation": (
        ("--prefill", "1", "--decode", "1"),
        {"CELERIAC_ENGINE__SPECULATION": "ngram", "CELERIAC_ENGINE__SPECULATION_MAX_SEQS": "64"},
    ),
}
NEEDED = {
    "rdma": (needs_nixl,),
    "direct": (needs_nixl,),
    "cuda": (needs_gpu,),
    "direct cuda": (needs_nixl, needs_gpu),
}
pytestmark = pytest.mark.gate


def _greedy(prompt_ids: list[int], max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt_ids, "max_tokens": max_tokens, "temperature": 0}


def _generate(model: Any, prompt_ids: list[int], num_tokens: int) -> list[int]:
    ids = torch.tensor([prompt_ids])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=num_tokens, max_new_tokens=num_tokens, do_sample=False
    )
    new: list[int] = output[0, len(prompt_ids) :].tolist()
    return new


@pytest.mark.parametrize("layout", [pytest.param(name, marks=NEEDED.get(name, ())) for name in LAYOUTS])
def test_tokens_equal_transformers_on_every_prompt(layout: str, tmp_path: Path) -> None:
    flags, env = LAYOUTS[layout]
    with running_cluster(tmp_path, "--dtype", "float32", *flags, env=env) as cluster:
        # All at once: prefills are batched and chunked, decode steps mix sequences of all lengths.
        streams = asyncio.run(read_streams(cluster.url, [_greedy(p["prompt_ids"], 64) for p in PROMPTS]))
        # And once more, now out of the prefix cache where there is one.
        again = asyncio.run(read_streams(cluster.url, [_greedy(p["prompt_ids"], 64) for p in PROMPTS[-20:]]))

    differing = [
        p["messages"][-1]["content"][-60:]
        for p, s in zip([*PROMPTS, *PROMPTS[-20:]], [*streams, *again], strict=True)
        if s.token_ids != [p["completion_ids"]]
    ]
    assert not differing, f"{len(differing)} of {len(PROMPTS) + 20} prompts differ: {differing[:5]}"


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_tokens_equal_transformers_on_random_checkpoints(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    prompts = [[(7 * i * k + 3) % 250 + 3 for i in range(n)] for k, n in enumerate((1, 5, 31, 32, 33, 70, 150))]
    expected = [_generate(reference_model(folder), prompt, 24) for prompt in prompts]

    with running_cluster(tmp_path / "run", "--model", str(folder), "--dtype", "float32") as cluster:
        # min_new_tokens masks the end token in `generate`; min_tokens does the same here.
        bodies = [{**_greedy(p, 24), "min_tokens": 24} for p in prompts]
        streams = asyncio.run(read_streams(cluster.url, bodies))

    assert [s.token_ids[0] for s in streams] == expected
