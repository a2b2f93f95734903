"""Writes a checkpoint as a Hugging Face model folder."""

import json
from pathlib import Path

import torch

from training.shape import CONFIG, SPECIAL_TOKENS

END_IDS = [SPECIAL_TOKENS.index("<|im_end|>"), SPECIAL_TOKENS.index("<|endoftext|>")]


def export(out: Path, checkpoint: Path) -> None:
    """Write model.safetensors (bfloat16), config.json and generation_config.json into `out`."""
    from safetensors.torch import save_file

    weights = torch.load(checkpoint, weights_only=True)["model"]
    path = out / "model.safetensors"
    save_file({k: v.bfloat16().contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(model_config(), indent=1))
    generation = {"eos_token_id": END_IDS, "pad_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1))
    print("exported", path.stat().st_size, "bytes")


def model_config() -> dict:
    """Contents of config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": None,
        "eos_token_id": END_IDS[0],
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        **CONFIG,
        "rope_parameters": {"rope_type": "default", "rope_theta": CONFIG["rope_theta"]},  # transformers 5 reads this
    }
