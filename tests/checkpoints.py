"""Small checkpoints with random weights, in the layout of real ones: config, safetensors, byte-level tokenizer.

    folder = make_checkpoint(tmp_path, "qwen3", num_hidden_layers=2)

transformers makes and saves them, so what the engine reads is what users have. They can be served end to end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SPECIAL_TOKENS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def make_checkpoint(tmp: Path, family: str, *, seed: int = 0, max_shard_size: str = "5GB", **shape: Any) -> Path:
    """A folder `tmp/<family>-<seed>` with a random model of `family`; `shape` overrides fields of its config."""
    folder = tmp / f"{family}-{seed}"
    tokenizer = _byte_tokenizer()
    fields = {**_SHAPE, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": EOS_TOKEN_ID, "pad_token_id": 0}
    fields |= {"bos_token_id": None, **_family_fields(family), **shape}
    config = transformers.AutoConfig.for_model(family, **fields)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The usual initialisation gives nearly equal logits, zero biases and norms of one, which hide mistakes.
            spread = 0.3 if name.endswith("bias") else 0.15
            parameter.normal_(1.0 if "norm" in name else 0.0, spread)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _save_tokenizer(folder, tokenizer)
    return folder


def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The same folder as transformers runs it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def _family_fields(family: str) -> dict[str, Any]:
    match family:
        case "mistral":
            return {"sliding_window": None, "head_dim": 16}
        case "qwen3":
            return {"head_dim": 32}  # not hidden_size / num_attention_heads
        case _:
            return {}


def _byte_tokenizer() -> Tokenizer:
    """One token per byte, after the special ones: any text can be encoded, and 259 ids are enough."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(fields, indent=1))
