"""Which linear layers an engine runs on: decided once, said in one log line."""

from __future__ import annotations

import logging
from typing import Final

import torch

from engines.errors import DeviceUnavailable
from engines.ext.library import Kernels
from engines.linear.amx import Tiles, find_tiles
from engines.linear.backend import LinearBackend
from engines.linear.native_linear import NativeBackend, Quantization
from engines.linear.onednn_linear import OnednnBackend
from engines.linear.torch_linear import TorchBackend

logger = logging.getLogger(__name__)

_ON_TILES: Final = {Tiles.AMX: ", on AMX tiles", Tiles.EMULATED: ", on emulated AMX tiles (slow)"}


def choose_linear(
    asked: str,
    *,
    dtype: torch.dtype,
    device: str,
    kernels: Kernels | None = None,
    deterministic: bool = False,
    quantization: Quantization | None = None,
) -> LinearBackend:
    """The backend for the setting `engine.linear` (auto, torch, onednn, native). `auto` tries native, onednn, torch.

    Raises:
        DeviceUnavailable: what was asked for by name, or what `deterministic` or `quantization` need, is not to be had.
    """
    if quantization is not None:
        return _quantized(asked, kernels, quantization)
    why_not_native = _why_not_native(asked, kernels)
    why_not_onednn = _why_not_onednn(dtype, device) if asked == "onednn" or why_not_native else ""
    if asked in ("auto", "native") and kernels is not None and not why_not_native:
        tiles = find_tiles(kernels)
        logger.info("linear layers: native%s", "" if tiles is None else _ON_TILES[tiles])
        return NativeBackend(kernels, tiles=tiles)
    if asked == "native":
        raise DeviceUnavailable(asked=asked, why=why_not_native, hint="Set `engine.linear` to auto, onednn or torch.")
    if deterministic:
        if why_not_onednn or asked == "torch":
            raise DeviceUnavailable(
                asked="engine.deterministic",
                why=why_not_onednn or "torch's linear layers depend on the batch",
                hint="Set `engine.linear` to auto, or `engine.deterministic` to false.",
            )
        logger.info("linear layers: onednn, deterministic (native: %s)", why_not_native)
        return OnednnBackend(deterministic=True)
    if asked == "onednn" and why_not_onednn:
        raise DeviceUnavailable(asked="onednn", why=why_not_onednn, hint="Set `engine.linear` to auto or torch.")
    backend: LinearBackend = TorchBackend() if asked == "torch" or why_not_onednn else OnednnBackend()
    reasons = [f"native: {why_not_native}"] + ([f"onednn: {why_not_onednn}"] if why_not_onednn else [])
    logger.info("linear layers: %s%s", backend.name, f" ({'; '.join(reasons)})" if asked == "auto" else "")
    return backend


def head_backend(layers: LinearBackend) -> LinearBackend:
    """What makes the head of a model whose layers `layers` makes."""
    return layers.for_head() if isinstance(layers, NativeBackend) else layers


def _quantized(asked: str, kernels: Kernels | None, quantization: Quantization) -> NativeBackend:
    name = f"engine.quantization=int{quantization.bits}"
    if asked not in ("auto", "native"):
        raise DeviceUnavailable(
            asked=name,
            why=f"`engine.linear` is {asked}, and only native linear layers are quantised",
            hint="Set `engine.linear` to auto, or `engine.quantization` to none.",
        )
    if kernels is None:
        raise DeviceUnavailable(
            asked=name,
            why="there are no C++ kernels for this device, or `engine.kernels` is torch",
            hint="Set `engine.quantization` to none, or `engine.kernels` to auto on a CPU with g++.",
        )
    logger.info(
        "linear layers: native, int%d%s; head: int8",
        quantization.bits,
        f" in groups of {quantization.group} inputs" if quantization.group else "",
    )
    return NativeBackend(kernels, quantization)


def _why_not_native(asked: str, kernels: Kernels | None) -> str:
    """Empty if it is to be taken. Without AVX-512 only its name brings it."""
    if kernels is None:
        return "there are no C++ kernels for this device, or `engine.kernels` is torch"
    if asked not in ("auto", "native"):
        return "not asked for"
    if asked == "native":
        return ""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return "measured on CPUs with AVX-512 only"
    return ""


def _why_not_onednn(dtype: torch.dtype, device: str) -> str:
    """Empty if it works, tried on a small layer: a CPU without bfloat16 instructions refuses it only when called."""
    if device != "cpu":
        return "oneDNN is for CPUs"
    if not torch._C._has_mkldnn:
        return "this torch was built without oneDNN"
    try:
        OnednnBackend().make(torch.ones(16, 16, dtype=dtype))(torch.ones(1, 16, dtype=dtype))
    except (RuntimeError, AttributeError) as error:
        return f"oneDNN refuses {str(dtype).removeprefix('torch.')}: {str(error).splitlines()[0]}"
    return ""
