"""Models: from a Hugging Face folder to a forward pass.

Owns what config.json means (`config`), where a folder comes from (`source`), reading safetensors (`safetensors_header`,
`loader`) and the one module of the Llama family (`llama`, `rope`). Must not know sequences, schedulers or sampling: it
sees packed token ids and positions, and reaches KV only through an attention backend. `config` and `source` import no
torch; `llama`, `rope` and `loader` do, so they are imported by name and only inside the engine process.
"""

from engines.models.config import ModelConfig, RopeConfig

__all__ = ["ModelConfig", "RopeConfig"]
