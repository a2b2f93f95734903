"""Runs jobs on llama.cpp through its C API. Started with the Python of its own venv; imports nothing of ours.

    <venv>/bin/python benchmarks/engine_llama_cpp_runner.py --model FOLDER --dtype bfloat16 --cpus 0,1

One JSON object per line in ({"num_requests", "input_len", "output_len", "seed"}), one out ({"seconds", "num_tokens"}),
the same as `python -m engines.solo --jobs`: the same prompts, greedy, exact output lengths, no text. Each job has a
context of its own, as large as it needs, made before its time is taken; then the prompts are one llama_decode and each
further token of all sequences is one.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PROMPT_IDS = range(3, 1000)
CONTEXT_STEP = 256  # llama.cpp rounds the context of a sequence up to this
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE_LAYERS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--cpus", required=True, help="Core numbers with commas, a thread on each.")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # llama.cpp logs; standard output is for answers only
    cpus = [int(cpu) for cpu in args.cpus.split(",")]
    os.sched_setaffinity(0, cpus)

    started_s = time.monotonic()
    api: Any = importlib.import_module("llama_cpp")
    api.llama_backend_init()
    with tempfile.TemporaryDirectory(prefix="celeriac-gguf-") as folder:
        path = Path(folder, "model.gguf")
        write_gguf(args.model, path, dtype=args.dtype)
        model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp cannot read the GGUF made of {args.model}; its reason is above")
        facts = {
            "llama-cpp-python": api.__version__,
            "system": api.llama_print_system_info().decode(),
            "load_s": time.monotonic() - started_s,
        }
        print(json.dumps(facts), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(_run(api, model, json.loads(line), len(cpus))), file=answers, flush=True)
        api.llama_model_free(model)


def _run(api: Any, model: Any, job: dict[str, Any], num_threads: int) -> dict[str, float]:
    rng = random.Random(job["seed"])
    prompts = []
    for _ in range(job["num_requests"]):
        rng.randint(job["output_len"], job["output_len"])  # `engines.solo` draws a length here: same prompts
        prompts.append(rng.choices(PROMPT_IDS, k=job["input_len"]))
    context = _make_context(api, model, prompts, job["output_len"], num_threads)
    started_s = time.monotonic()
    outputs = generate(api, model, context, prompts, job["output_len"])
    seconds = time.monotonic() - started_s
    api.llama_free(context)
    return {"seconds": seconds, "num_tokens": sum(map(len, outputs))}


def _make_context(api: Any, model: Any, prompts: list[list[int]], output_len: int, num_threads: int) -> Any:
    params = api.llama_context_default_params()
    per_seq = -(-(len(prompts[0]) + output_len) // CONTEXT_STEP) * CONTEXT_STEP
    params.n_ctx = per_seq * len(prompts)
    params.n_seq_max = len(prompts)
    params.n_batch = max(512, sum(map(len, prompts)))
    params.n_threads = params.n_threads_batch = num_threads
    context = api.llama_init_from_model(model, params)
    if not context:
        raise SystemExit(f"llama.cpp makes no context for {len(prompts)} sequences of {per_seq} tokens")
    return context


def generate(api: Any, model: Any, context: Any, prompts: list[list[int]], output_len: int) -> list[list[int]]:
    """Greedy: `output_len` ids for each prompt."""
    vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(sum(map(len, prompts)), 0, 1)
    outputs: list[list[int]] = [[] for _ in prompts]
    spans = [(0, prompt) for prompt in prompts]  # first position and ids of each sequence's new tokens
    for step in range(output_len):
        ends = _fill(batch, spans)
        if api.llama_decode(context, batch):
            raise SystemExit("llama_decode failed; its reason is above")
        for sequence, end in enumerate(ends):
            row = api.llama_get_logits_ith(context, end)
            logits = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (vocab_size,))
            outputs[sequence].append(int(logits.argmax()))
        spans = [(len(prompt) + step, outputs[i][-1:]) for i, prompt in enumerate(prompts)]
    api.llama_batch_free(batch)
    return outputs


def _fill(batch: Any, spans: list[tuple[int, list[int]]]) -> list[int]:
    """Where the last token of each sequence is in the batch; only these have logits."""
    at, ends = 0, []
    for sequence, (first, ids) in enumerate(spans):
        for k, token_id in enumerate(ids):
            batch.token[at], batch.pos[at] = token_id, first + k
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = k == len(ids) - 1
            at += 1
        ends.append(at - 1)
    batch.n_tokens = at
    return ends


def write_gguf(model: Path, path: Path, *, dtype: str) -> None:
    """A Llama-type checkpoint of one bfloat16 safetensors file as GGUF, without a vocabulary. Norms are fp32."""
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((model / "config.json").read_text())
    num_heads, num_kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(num_kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // num_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, bits in _tensors(model / "model.safetensors"):
        values = bits
        if "q_proj" in name or "k_proj" in name:
            # GGUF's Llama turns neighbouring pairs, the checkpoint's turns halves.
            heads = num_heads if "q_proj" in name else num_kv_heads
            values = bits.reshape(heads, 2, -1, bits.shape[1]).swapaxes(1, 2).reshape(bits.shape)
        if dtype == "bfloat16" and bits.ndim == 2:
            raw = np.ascontiguousarray(values).view(np.uint8)
            writer.add_tensor(_gguf_name(name), raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(_gguf_name(name), (values.astype(np.uint32) << 16).view(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    if name in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[name]
    _, _, number, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{_NAMES[part]}.weight"


def _tensors(path: Path) -> list[tuple[str, Any]]:
    """Names and bfloat16 bits (uint16), memory-mapped."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    found = []
    for name, entry in header.items():
        if name != "__metadata__":
            if entry["dtype"] != "BF16":
                raise SystemExit(
                    f"{path}: {name} is {entry['dtype']}. Expected BF16, as the benchmark's checkpoints are."
                )
            start, end = entry["data_offsets"]
            bits = np.memmap(path, np.uint16, "r", 8 + size + start, ((end - start) // 2,))
            found.append((name, bits.reshape(entry["shape"])))
    return found


if __name__ == "__main__":
    main()
