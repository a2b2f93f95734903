"""Where tests of the engine's tensors run: on the CPU always, on a GPU where torch finds one."""

from __future__ import annotations

import pytest
import torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is False here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
