"""Which device an engine takes, and what it says where there is none."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from engines.errors import DeviceUnavailable, KernelsUnavailable
from engines.ext.library import find_kernels
from engines.factory import choose_device, choose_dtype, keep_products_exact
from engines.machine_rates import main as machine_rates


def a_machine(monkeypatch: pytest.MonkeyPatch, *, has_gpu: bool, build: str | None = "12.8") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.version, "cuda", build)


def test_auto_takes_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine(monkeypatch, has_gpu=True)
    assert (choose_device("auto"), choose_device("cuda"), choose_device("cpu")) == ("cuda", "cuda", "cpu")
    a_machine(monkeypatch, has_gpu=False)
    assert choose_device("auto") == "cpu"


def test_cuda_with_a_torch_for_cpus_is_refused_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine(monkeypatch, has_gpu=False, build=None)
    with pytest.raises(DeviceUnavailable, match=r"built for CPUs only.*TORCH=cuda"):
        choose_device("cuda")


def test_cuda_without_a_visible_gpu_says_what_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine(monkeypatch, has_gpu=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(DeviceUnavailable, match=r"no GPU with CUDA_VISIBLE_DEVICES='7'.*nvidia-smi"):
        choose_device("cuda")


def test_ranks_stay_on_the_cpu_or_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine(monkeypatch, has_gpu=True)
    assert choose_device("auto", num_ranks=2) == "cpu"
    with pytest.raises(DeviceUnavailable, match="tensor_parallel_size"):
        choose_device("cuda", num_ranks=2)


def test_a_device_that_nobody_knows_is_refused() -> None:
    with pytest.raises(DeviceUnavailable, match="auto, cpu or cuda"):
        choose_device("tpu")


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_on_a_gpu_is_bfloat16_where_the_gpu_has_it(
    has_bfloat16: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    assert choose_dtype("auto", "cuda") is expected
    assert choose_dtype("float32", "cuda") is torch.float32


def test_float32_is_not_rounded_to_tf32() -> None:
    flags = [torch.backends.cuda.matmul, torch.backends.cudnn]
    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = True
        keep_products_exact("cpu")
        assert [flag.allow_tf32 for flag in flags] == [True, True]
        keep_products_exact("cuda")
        assert [flag.allow_tf32 for flag in flags] == [False, False]
    finally:
        for flag, value in zip(flags, before, strict=True):
            flag.allow_tf32 = value


def test_the_benchmark_of_a_gpu_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    a_machine(monkeypatch, has_gpu=False)
    result = CliRunner().invoke(machine_rates, ["--device", "cuda"])
    assert result.exit_code == 1
    assert "torch sees no GPU" in result.output


def test_kernels_for_cpus_are_never_given_the_memory_of_a_gpu() -> None:
    assert find_kernels("auto", dtype=torch.bfloat16, device="cuda") is None
    with pytest.raises(KernelsUnavailable, match="the device is cuda"):
        find_kernels("native", dtype=torch.bfloat16, device="cuda")
