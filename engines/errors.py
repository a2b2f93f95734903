"""What can go wrong in `engines`, as one tree (the tokenizer has its own).

EngineError(retryable)
├── ModelError                 the model folder cannot be served as it is
│   ├── BadModelConfig         config.json: a field is missing or breaks a rule
│   ├── UnsupportedModel       a kind of model, rope, attention or quantisation that this engine does not have
│   └── BadWeights             a weights file is damaged, or does not fit config.json
├── DeviceUnavailable          the device or dtype asked for is not to be had here
├── KernelsUnavailable         the C++ kernels could not be built or loaded; torch does their work
├── ContextTooLong             `model.max_model_len` is more than the model was made for
├── PoolTooSmall               the KV pool cannot hold one sequence of the longest length
├── BounceTooSmall             KV that moves through host memory: the longest sequence does not fit in
├── ForwardFailed              one step failed in torch (memory, mostly)                       (retryable)
└── NonFiniteLogits            a step's logits are NaN: damaged KV or weights, never sampled   (retryable)
"""

from __future__ import annotations

from math import ceil
from pathlib import Path


class EngineError(Exception):
    """Base of all errors of this package. `retryable`: the same request may succeed on another worker."""

    retryable: bool = False


class ModelError(EngineError):
    """A model folder that cannot be served. The message names the file, the fault, and what was expected."""

    def __init__(self, path: Path, problem: str, expected: str) -> None:
        super().__init__(f"{path}: {problem}. {expected}")
        self.path = path
        self.problem = problem
        self.expected = expected


class BadModelConfig(ModelError):
    """A field of config.json (or generation_config.json) is missing or breaks a rule."""

    def __init__(self, path: Path, *, field: str, found: object, rule: str) -> None:
        super().__init__(
            path, f"`{field}` is {found!r}", f"Expected {rule}; use the config that belongs to these weights."
        )
        self.field = field
        self.found = found
        self.rule = rule


class UnsupportedModel(ModelError):
    """Well-formed, but of a kind that this engine does not run. Serving it anyway would give silently wrong text."""


class BadWeights(ModelError):
    """A weights file is damaged, or its tensors are not those that config.json asks for."""


class DeviceUnavailable(EngineError):
    """The device or dtype that the settings ask for cannot be used."""

    def __init__(self, *, asked: str, why: str, hint: str) -> None:
        super().__init__(f"`{asked}` cannot be used: {why}. {hint}")
        self.asked = asked
        self.why = why


class KernelsUnavailable(EngineError):
    """The C++ kernels cannot be used on this machine. With `auto` it is logged and torch takes their place."""

    def __init__(self, *, why: str, hint: str) -> None:
        super().__init__(f"No C++ kernels: {why}. {hint}")
        self.why = why
        self.hint = hint


class ContextTooLong(EngineError):
    """A context that the model has no positions for."""

    def __init__(self, *, asked: int, limit: int) -> None:
        super().__init__(
            f"`model.max_model_len` is {asked}, the model's `max_position_embeddings` is {limit}. "
            f"Expected at most {limit}; 0 takes the model's own."
        )
        self.asked = asked
        self.limit = limit


class PoolTooSmall(EngineError):
    """One sequence of `max_model_len` tokens would never get its blocks."""

    def __init__(self, *, num_blocks: int, block_size: int, block_bytes: int, max_model_len: int) -> None:
        needed = -(-max_model_len // block_size)
        super().__init__(
            f"{num_blocks} KV blocks of {block_size} tokens hold less than one sequence of {max_model_len} tokens. "
            f"Expected at least {needed} blocks of {block_bytes} bytes ({needed * block_bytes / 2**20:.1f} MiB): "
            "raise `kv.memory_bytes` or lower `model.max_model_len`."
        )
        self.needed_blocks = needed


class BounceTooSmall(EngineError):
    """A sequence of `max_model_len` tokens could not move in each direction at once."""

    def __init__(self, *, bounce_bytes: int, needed_bytes: int, max_model_len: int) -> None:
        needed_mib = ceil(needed_bytes / 2**20 * 10) / 10
        super().__init__(
            f"`kv.bounce_bytes` is {bounce_bytes / 2**20:.1f} MiB. Expected at least {needed_mib:.1f} MiB: "
            f"two sequences of {max_model_len} tokens, one on its way out and one on its way in. Raise it, lower "
            "`model.max_model_len`, or set 0, which takes a size that works."
        )
        self.needed_bytes = needed_bytes


class ForwardFailed(EngineError):
    """A step failed inside torch. Its sequences have no valid KV for the tokens of this step."""

    retryable = True

    def __init__(self, *, step_id: int, num_tokens: int, detail: str) -> None:
        super().__init__(
            f"Step {step_id} over {num_tokens} tokens failed in torch: {detail}. "
            "Expected a forward pass; lower `max_num_batched_tokens` or `kv.memory_bytes` if it ran out of memory."
        )
        self.step_id = step_id
        self.num_tokens = num_tokens


class NonFiniteLogits(EngineError):
    """The model's output for these sequences is NaN. No token was sampled in this step."""

    retryable = True

    def __init__(self, *, request_ids: list[str]) -> None:
        super().__init__(
            f"The logits of {', '.join(request_ids)} are NaN. Expected finite numbers: the KV or the weights of this "
            "worker are damaged; run it again on another worker, and check the model's files if it happens there, too."
        )
        self.request_ids = request_ids
