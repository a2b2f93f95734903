"""The C++ row operations against torch's; building, caching, and what happens when that cannot be done."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from engines.errors import DeviceUnavailable, KernelsUnavailable
from engines.ext import build, library
from engines.ext.row_ops import NativeRowOps
from engines.linear.choose import choose_linear
from engines.models.row_ops import TorchRowOps
from kvstore.errors import NativeUnavailable
from kvstore.native import load_library

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 576), (5, 40), (300, 256)])
def test_norms_and_silu_equal_those_of_torch(dtype: torch.dtype, num_tokens: int, size: int) -> None:
    native, reference = NativeRowOps(library.load_kernels(dtype)), TorchRowOps()
    x, delta = torch.randn(num_tokens, size).to(dtype), torch.randn(num_tokens, size).to(dtype)
    weight = torch.randn(size).to(dtype)
    hidden, expected_hidden = x.clone(), x.clone()

    assert_same(native.norm(x, weight, 1e-5), reference.norm(x, weight, 1e-5))
    normed = native.add_norm(hidden, delta, weight, 1e-5)
    assert_same(normed, reference.add_norm(expected_hidden, delta, weight, 1e-5))
    assert torch.equal(hidden, expected_hidden)
    gate_up = torch.randn(num_tokens, 2 * size).to(dtype) * 20
    assert_same(native.silu_mul(gate_up), reference.silu_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_rotation_and_norm_of_heads_leave_their_neighbours_alone(dtype: torch.dtype, head_dim: int) -> None:
    native, reference = NativeRowOps(library.load_kernels(dtype)), TorchRowOps()
    heads = torch.randn(7, 5, head_dim).to(dtype)
    cos, sin = torch.randn(7, 1, head_dim).to(dtype), torch.randn(7, 1, head_dim).to(dtype)
    weight = torch.randn(head_dim).to(dtype)
    turned = heads.clone()

    assert_same(native.norm(heads[:, 1:3], weight, 1e-6), reference.norm(heads[:, 1:3], weight, 1e-6))
    assert_same(native.rotate(turned[:, :3], cos, sin), reference.rotate(heads[:, :3], cos, sin))
    assert torch.equal(turned[:, 3:], heads[:, 3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [1, 3, 32, 130])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_linear_layers_equal_those_of_torch(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    weight, x = torch.randn(160, 96).to(dtype), torch.randn(num_rows, 96).to(dtype)
    bias = torch.randn(160).to(dtype) if has_bias else None
    packed = choose_linear("onednn", dtype=dtype, device="cpu").make(weight, bias)

    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(packed(x).double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_linear_backend_asked_for_by_name_is_not_replaced() -> None:
    with pytest.raises(DeviceUnavailable, match="oneDNN is for CPUs"):
        choose_linear("onednn", dtype=torch.float32, device="cuda")
    assert choose_linear("auto", dtype=torch.float32, device="cuda").name == "torch"


def test_workers_that_start_together_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, log = tmp_path / "slow-compiler", tmp_path / "log"
    compiler.write_text(f'#!/bin/sh\necho built >> {log}\nfor last; do :; done\necho code > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    with ThreadPoolExecutor(4) as threads:
        paths = set(threads.map(lambda _: build.build_library(), range(4)))

    assert len(paths) == 1
    assert log.read_text().splitlines() == ["built"]
    assert [path.suffix for path in (tmp_path / "cache/celeriac/kernels").iterdir() if path.is_file()] in (
        [".so", ""],
        ["", ".so"],
    )


def test_a_failing_compiler_costs_one_log_line_unless_kernels_were_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho 'kernels.cpp:1: error: no such CPU' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert library.find_kernels("auto", dtype=torch.float32, device="cpu") is None
        with pytest.raises(KernelsUnavailable, match="no such CPU"):
            library.find_kernels("native", dtype=torch.float32, device="cpu")
    finally:
        load_library.cache_clear()

    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "run on torch" in caplog.text


def test_a_file_that_is_no_library_is_named_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nfor last; do :; done\necho code > "$last"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_library.cache_clear()
    try:
        for load, error in ((build.load_library, KernelsUnavailable), (load_library, NativeUnavailable)):
            with pytest.raises(error, match=r"kernels/\w+\.so does not load: .* Delete it; it is built again\."):
                load(build.SOURCES)
    finally:
        load_library.cache_clear()


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(KernelsUnavailable, match=r"Install g\+\+"):
        build.build_library()
