"""FlashInfer is called as its documentation says, checked at the start, and left alone where it is wrong.

The kernels themselves run only where there is a GPU; here plain torch stands behind the same two wrappers
(tests/reference_flashinfer.py), which checks each argument.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engines.attention.choose_gpu import attention_error, choose_gpu_attention
from engines.attention.flashinfer_backend import FlashInferAttention, find_flashinfer
from engines.attention.torch_backend import TorchAttention
from engines.graphs.decode_graphs import DecodeGraphs
from tests import reference_flashinfer
from tests.checkpoints import make_checkpoint
from tests.devices import needs_gpu
from tests.recorded_graphs import RecordedGraphs
from tests.unit.engines.test_decode_graphs import SCRATCH, Rig, load, random_steps


def region(dtype: torch.dtype = torch.bfloat16, *, head_dim: int = 64, device: str = "cpu") -> Tensor:
    return torch.zeros(4, 2, 2, 2, 8, head_dim, dtype=dtype, device=device)


def test_decode_graphs_over_its_wrappers_equal_the_eager_pass(tmp_path: Path) -> None:
    model = load(make_checkpoint(tmp_path, "llama", seed=3))
    rig, eager, graphs = Rig(model, None), Rig(model, None), RecordedGraphs()
    attention = FlashInferAttention(rig.kv, model.config.num_heads, reference_flashinfer)
    rig.forward._attention = attention
    rig.forward._graphs = DecodeGraphs(
        rig.kv, scratch_block=SCRATCH, forward=model.forward, make_attention=attention.for_graph, maker=graphs
    )

    with torch.inference_mode():
        for batch, rows in random_steps(4, 12):
            torch.testing.assert_close(rig.step(batch, rows), eager.step(batch, rows), rtol=1e-3, atol=1e-4)

    assert rig.graphs.is_on
    assert len(graphs.graphs) >= 3
    assert not rig.kv[SCRATCH].any()


def _chosen(caplog: pytest.LogCaptureFixture, kv: Tensor, flashinfer: Any) -> tuple[type, str]:
    with caplog.at_level(logging.INFO, logger="engines.attention.choose_gpu"):
        attention = choose_gpu_attention(kv, 8, flashinfer)
    (record,) = caplog.records
    return type(attention), record.getMessage()


def test_flashinfer_is_taken_where_it_is_there_and_right(caplog: pytest.LogCaptureFixture) -> None:
    assert _chosen(caplog, region(), reference_flashinfer) == (FlashInferAttention, "attention: FlashInfer")


@pytest.mark.parametrize(
    ("kv", "package", "says"),
    [
        (region(), None, "not installed"),
        (region(torch.float32), reference_flashinfer, "no kernels for float32 with head_dim 64"),
        (region(head_dim=80), reference_flashinfer, "no kernels for bfloat16 with head_dim 80"),
    ],
)
def test_torch_is_taken_where_flashinfer_cannot_be(
    kv: Tensor, package: Any, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    chosen, message = _chosen(caplog, kv, package)
    assert chosen is TorchAttention
    assert says in message


class _ForgetsTheLastToken(reference_flashinfer.BatchDecodeWithPagedKVCacheWrapper):
    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        self.last = (self.last - 1).clamp(min=1)
        return super().run(q, paged_kv_cache)


class _ReadsWhatIsNotItsOwn(reference_flashinfer.BatchPrefillWithPagedKVCacheWrapper):
    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        self.last = torch.full_like(self.last, self.shape[3])
        return super().run(q, paged_kv_cache)


class _Broken(reference_flashinfer.BatchDecodeWithPagedKVCacheWrapper):
    def run(self, *_: Any) -> Tensor:
        raise FileNotFoundError("nvcc")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"BatchDecodeWithPagedKVCacheWrapper": _ForgetsTheLastToken}, "differs from torch by"),
        ({"BatchPrefillWithPagedKVCacheWrapper": _ReadsWhatIsNotItsOwn}, "differs from torch by inf"),
        ({"BatchDecodeWithPagedKVCacheWrapper": _Broken}, "FileNotFoundError: nvcc"),
    ],
)
def test_kernels_that_are_wrong_are_found_at_the_start_and_not_used(
    wrong: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    package = SimpleNamespace(**{**vars(reference_flashinfer), **wrong})
    chosen, message = _chosen(caplog, region(), package)
    assert chosen is TorchAttention
    assert says in message


@needs_gpu
@pytest.mark.skipif(find_flashinfer() is None, reason="the package flashinfer is not installed")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_heads", [2, 4, 14])
def test_its_kernels_agree_with_torch_on_this_gpu(head_dim: int, num_heads: int) -> None:
    assert attention_error(region(head_dim=head_dim, device="cuda"), num_heads, find_flashinfer()) < 0.02
