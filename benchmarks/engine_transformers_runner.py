"""Runs jobs on `transformers.generate` with its DynamicCache. Imports nothing of ours.

    python benchmarks/engine_transformers_runner.py --model FOLDER --dtype bfloat16 --cpus 0,1

One JSON object per line in ({"num_requests", "input_len", "output_len", "seed"}), one out ({"seconds", "num_tokens"}),
the same as `python -m engines.solo --jobs`: the same prompts, all in one batch, greedy, exact output lengths, no text.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
from typing import Any

PROMPT_IDS = range(3, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cpus", required=True, help="Core numbers with commas, a thread on each.")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # warnings of libraries are no answers
    cpus = [int(cpu) for cpu in args.cpus.split(",")]
    os.sched_setaffinity(0, cpus)

    started_s = time.monotonic()
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    torch.set_num_threads(len(cpus))
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    model.generation_config.eos_token_id = None  # outputs have exactly the length that was asked for
    model.generation_config.pad_token_id = 0
    load_s = time.monotonic() - started_s
    print(json.dumps({"transformers": transformers.__version__, "load_s": load_s}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(torch, model, json.loads(line))), file=answers, flush=True)


def _run(torch: Any, model: Any, job: dict[str, Any]) -> dict[str, float]:
    rng = random.Random(job["seed"])
    prompts = []
    for _ in range(job["num_requests"]):
        rng.randint(job["output_len"], job["output_len"])  # `engines.solo` draws a length here: same prompts
        prompts.append(rng.choices(PROMPT_IDS, k=job["input_len"]))
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    started_s = time.monotonic()
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=job["output_len"], do_sample=False)
    seconds = time.monotonic() - started_s
    return {"seconds": seconds, "num_tokens": out.shape[0] * (out.shape[1] - ids.shape[1])}


if __name__ == "__main__":
    main()
