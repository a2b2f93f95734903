"""Which linear layers an engine runs on: decided once, said in one log line."""

from __future__ import annotations

import logging

import torch

from engines.errors import DeviceUnavailable
from engines.linear.backend import LinearBackend
from engines.linear.onednn_linear import OnednnBackend
from engines.linear.torch_linear import TorchBackend

logger = logging.getLogger(__name__)


def choose_linear(asked: str, *, dtype: torch.dtype, device: str, deterministic: bool = False) -> LinearBackend:
    """The backend for the setting `engine.linear` (auto, torch, onednn).

    Raises:
        DeviceUnavailable: `onednn` was asked for by name, or is what `deterministic` needs, and is not to be had.
    """
    why = _why_not_onednn(dtype, device)
    if deterministic:
        if why or asked == "torch":
            raise DeviceUnavailable(
                asked="engine.deterministic",
                why=why or "torch's linear layers depend on the batch",
                hint="Set `engine.linear` to auto, or `engine.deterministic` to false.",
            )
        logger.info("linear layers: onednn, deterministic")
        return OnednnBackend(deterministic=True)
    if asked == "onednn" and why:
        raise DeviceUnavailable(asked="onednn", why=why, hint="Set `engine.linear` to auto or torch.")
    backend: LinearBackend = TorchBackend() if asked == "torch" or why else OnednnBackend()
    logger.info("linear layers: %s%s", backend.name, f" ({why})" if asked == "auto" and why else "")
    return backend


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
