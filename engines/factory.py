"""From settings to a loaded model: which device, which dtype, which module."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch

from engines.errors import DeviceUnavailable, UnsupportedModel
from engines.ext.library import find_kernels
from engines.linear.choose import choose_linear, head_backend
from engines.linear.native_linear import INT8, Quantization
from engines.models.config import ModelConfig
from engines.models.generic import GenericModel
from engines.models.generic_loader import load_generic
from engines.models.llama import LlamaModel
from engines.models.loader import Progress, load_weights
from engines.models.shape import ModelShape
from engines.tensor_parallel.ranks import Shard
from engines.tensor_parallel.shard import check_divisible, shard_config, shard_weights

logger = logging.getLogger(__name__)


def choose_device(asked: str, *, num_ranks: int = 1) -> str:
    """The torch device for the setting `device`: `auto` takes a GPU where there is one.

    Args:
        num_ranks: that share the model. Their KV is one region of host memory, so more than one are on the CPU.

    Raises:
        DeviceUnavailable: cuda was asked for by name and cannot be had; the message says what is missing.
    """
    if asked not in ("auto", "cpu", "cuda"):
        raise DeviceUnavailable(asked=asked, why="no such device here", hint="Set `device` to auto, cpu or cuda.")
    if asked == "cpu" or (asked == "auto" and (num_ranks > 1 or not torch.cuda.is_available())):
        return "cpu"
    if num_ranks > 1:
        raise DeviceUnavailable(
            asked=asked,
            why=f"`tensor_parallel_size` is {num_ranks}, and ranks share one KV region in host memory",
            hint="Set `tensor_parallel_size: 1`, or `device: cpu`.",
        )
    if not torch.cuda.is_available() and torch.version.cuda is None:
        raise DeviceUnavailable(
            asked=asked,
            why=f"torch {torch.__version__} was built for CPUs only",
            hint="Set up again with `TORCH=cuda make setup`, or set `device: cpu` or `auto`.",
        )
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hides = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        raise DeviceUnavailable(
            asked=asked,
            why=f"torch sees no GPU{hides}",
            hint="Check `nvidia-smi` and `--gpu`, or set `device: cpu` or `auto`.",
        )
    return "cuda"


def choose_dtype(asked: str, device: str) -> torch.dtype:
    """The dtype of weights and KV. `auto`: bfloat16 where the device multiplies it in hardware, else float32.

    Raises:
        DeviceUnavailable: a dtype that the engine does not have.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if asked == "auto":
        # Emulated bfloat16 is several times slower than float32 and less exact.
        has_bfloat16 = _has_bfloat16() if device == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if asked not in known:
        raise DeviceUnavailable(asked=asked, why="no such dtype here", hint=f"Set `dtype` to auto, {', '.join(known)}.")
    return known[asked]


def keep_products_exact(device: str) -> None:
    """Let a GPU multiply float32 as float32, and add bfloat16 products in float32: TF32 has 10 bits of mantissa."""
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def choose_quantization(asked: str, group: str) -> Quantization | None:
    """The settings `engine.quantization` (none, int8, int4) and `engine.quantization_group`."""
    return {"none": None, "int8": INT8, "int4": Quantization(bits=4, group=int(group))}[asked]


def _has_bfloat16() -> bool:
    flags = torch.backends.cpu.get_cpu_capability()
    return "AVX512" in flags and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def build_engine_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str = "cpu",
    progress: Progress | None = None,
    linear: str = "auto",
    kernels: str = "auto",
    deterministic: bool = False,
    quantization: Quantization | None = None,
    shard: Shard | None = None,
) -> tuple[LlamaModel | GenericModel, ModelShape]:
    """Read config and weights of a model folder. Blocks until all is in memory and in the order its linears want.

    Args:
        linear, kernels, deterministic: the settings of section `engine`.
        quantization: how the linear layers and the head store their weights; norms and the embedding stay as they are.
        shard: build one rank's part. The shape that is returned is that of the whole model.

    Raises:
        ModelError: the folder cannot be served; the message says what is wrong with which file.
        DeviceUnavailable, KernelsUnavailable: what was asked for by name is not to be had here.
    """
    started_s = time.monotonic()
    keep_products_exact(device)
    try:
        config = ModelConfig.from_folder(folder)
    except UnsupportedModel as error:
        logger.info("%s", error)
        if shard is not None:
            raise DeviceUnavailable(
                asked=f"tensor_parallel_size={shard.num_ranks}",
                why=f"{folder} runs on transformers' own layers, which are not cut into ranks",
                hint="Set it to 1, or serve a model of the Llama, Qwen or Mistral families.",
            ) from error
        if deterministic:
            raise DeviceUnavailable(
                asked="engine.deterministic",
                why=f"{folder} runs on transformers' own layers, whose results depend on the batch",
                hint="Set it to false, or serve a model of the Llama, Qwen or Mistral families.",
            ) from error
        if quantization is not None:
            raise DeviceUnavailable(
                asked=f"engine.quantization=int{quantization.bits}",
                why=f"{folder} runs on transformers' own layers, which are not quantised",
                hint="Set it to none, or serve a model of the Llama, Qwen or Mistral families.",
            ) from error
        return load_generic(folder, dtype=dtype, device=device)
    if deterministic and any(config.windows):
        raise DeviceUnavailable(
            asked="engine.deterministic",
            why=f"{folder} has sliding windows, whose attention depends on how a prompt is cut into chunks",
            hint="Set it to false, or serve a model without them.",
        )
    if shard is not None:
        check_divisible(config, shard.num_ranks)
    weights = load_weights(folder, config, dtype=dtype, device=device, progress=progress)
    own_config = config
    if shard is not None:
        own_config = shard_config(config, shard.num_ranks)
        weights = shard_weights(weights, config, shard.rank, shard.num_ranks)
    found = find_kernels(kernels, dtype=dtype, device=device)
    layers = choose_linear(
        linear, dtype=dtype, device=device, kernels=found, deterministic=deterministic, quantization=quantization
    )
    model = LlamaModel(
        own_config,
        weights,
        linear=layers,
        head=head_backend(layers),
        kernels=found,
        is_deterministic=deterministic,
        shard=shard,
    )
    logger.info("%s: loaded as %s in %.2f s", folder, str(dtype).removeprefix("torch."), time.monotonic() - started_s)
    return model, config
