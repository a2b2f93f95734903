"""Linear layers with 8 and 4 bits: the products of the rounded weights, each row the same bits in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from configs.schema import EngineSettings
from engines.errors import DeviceUnavailable
from engines.ext.library import load_kernels
from engines.factory import build_engine_model, choose_quantization
from engines.kv_layout import compat_of, weights_form
from engines.linear.choose import choose_linear, head_backend
from engines.linear.native_linear import INT8, NativeBackend, NativeLinear, Quantization
from engines.linear.quantize import quantize
from tests.checkpoints import make_checkpoint

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(160, 96), (33, 64), (100, 97), (31, 1), (577, 1536), (5000, 66)]  # (out, in)
KINDS = [INT8, Quantization(bits=8, group=32), Quantization(bits=4, group=32), Quantization(bits=4, group=128)]
MOST_ROWS = 400


def rows(dtype: torch.dtype, num_in: int) -> torch.Tensor:
    return torch.randn(MOST_ROWS, num_in, generator=torch.Generator().manual_seed(1)).to(dtype)


def make(dtype: torch.dtype, shape: tuple[int, int], kind: Quantization) -> tuple[NativeLinear, torch.Tensor]:
    """A layer, and what it should give for `rows`, computed in float64 with the rounded weights."""
    num_out, num_in = shape
    weight, bias = torch.randn(num_out, num_in).to(dtype), torch.randn(num_out).to(dtype)
    group = kind.group or num_in
    numbers, scales = quantize(weight, bits=kind.bits, group=group)
    rounded = numbers.double() * scales.double().repeat_interleave(group, dim=1)[:, :num_in]
    layer = NativeBackend(load_kernels(dtype), kind).make(weight, bias)
    return layer, torch.nn.functional.linear(rows(dtype, num_in).double(), rounded, bias.double())


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_rounded_weights(
    dtype: torch.dtype, shape: tuple[int, int], kind: Quantization
) -> None:
    layer, expected = make(dtype, shape, kind)
    x = rows(dtype, shape[1])

    for num_rows in (1, 3, MOST_ROWS):
        wide = layer.wide(x[:num_rows])
        torch.testing.assert_close(wide.double(), expected[:num_rows], rtol=1e-4, atol=1e-3)
        assert torch.equal(layer(x[:num_rows]), wide.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_batch_or_on_the_number_of_threads(dtype: torch.dtype, kind: Quantization) -> None:
    layer, _ = make(dtype, (577, 1000), kind)
    x = rows(dtype, 1000)
    torch.set_num_threads(1)
    whole = layer(x)

    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        assert torch.equal(layer(x), whole)
        for num_rows in (*range(1, 40), 127, 300):
            lo = (num_rows * 7) % (MOST_ROWS - num_rows)
            assert torch.equal(layer(x[lo : lo + num_rows]), whole[lo : lo + num_rows]), (num_threads, num_rows)


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 8)])
def test_rounding_moves_no_weight_by_more_than_a_step(bits: int, steps: int) -> None:
    weight = torch.randn(64, 256)
    weight[3] = 0
    numbers, scales = quantize(weight, bits=bits, group=64)

    moved = (numbers.view(64, 4, 64) * scales[..., None] - weight.view(64, 4, 64)).abs()

    assert numbers.min() >= -steps and numbers.max() <= steps - (bits == 4)
    # Half a step; only the one farthest on the other side of zero may lack the sixteenth number and be cut to -8..7.
    assert bool((moved <= scales.abs()[..., None] * (0.5 if bits == 8 else 1.0) + 1e-6).all())
    assert not numbers[3].any()


def test_a_quantised_weight_reads_half_or_a_quarter_of_the_bytes_and_some_scales() -> None:
    weight, kernels = torch.randn(640, 1024).to(torch.bfloat16), load_kernels(torch.bfloat16)
    plain, int8, int4 = (
        NativeBackend(kernels, kind).make(weight).num_bytes for kind in (None, INT8, Quantization(bits=4, group=64))
    )

    assert plain == 640 * 1024 * 2
    assert int8 == plain // 2 + 640 * 4
    assert int4 == plain // 4 + 640 * 1024 // 64 * 4


def test_the_head_has_eight_bits_where_the_layers_have_four() -> None:
    kernels = load_kernels(torch.bfloat16)
    layers = choose_linear(
        "auto", dtype=torch.bfloat16, device="cpu", kernels=kernels, quantization=choose_quantization("int4", "32")
    )
    head = head_backend(layers)

    assert isinstance(layers, NativeBackend) and layers.quantization == Quantization(bits=4, group=32)
    assert isinstance(head, NativeBackend) and head.quantization == INT8
    plain = NativeBackend(kernels)
    assert head_backend(plain) is plain


def test_quantisation_without_native_linears_is_refused() -> None:
    kernels = load_kernels(torch.float32)
    with pytest.raises(DeviceUnavailable, match="only native linear layers"):
        choose_linear("onednn", dtype=torch.float32, device="cpu", kernels=kernels, quantization=INT8)
    with pytest.raises(DeviceUnavailable, match=r"no C\+\+ kernels"):
        choose_linear("auto", dtype=torch.float32, device="cpu", quantization=INT8)


def test_quantisation_of_a_model_on_transformers_layers_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "gpt2", num_hidden_layers=2, max_position_embeddings=64)
    with pytest.raises(DeviceUnavailable, match="not quantised"):
        build_engine_model(folder, dtype=torch.float32, quantization=INT8)


def test_workers_of_unlike_quantisation_do_not_fit_together(tmp_path: Path) -> None:
    settings = [EngineSettings(), EngineSettings(quantization="int8"), EngineSettings(quantization="int4")]
    settings += [EngineSettings(quantization="int4", quantization_group="32")]

    words = [compat_of(tmp_path, "digest", weights_form(engine)) for engine in settings]

    assert len(set(words)) == len(words)
    assert "quantization=int8" in words[1] and "quantization=int4/64" in words[2]
