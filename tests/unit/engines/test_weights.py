"""Damaged and mismatched weights: each refused with the byte or the tensor, none ever unpickled."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engines.errors import BadWeights
from engines.factory import build_engine_model
from engines.models.checkpoint import INDEX_NAME, Checkpoint
from engines.models.safetensors_header import read_header
from tests.checkpoints import make_checkpoint


def safetensors_bytes(header: dict[str, Any] | str, num_data_bytes: int = 8) -> bytes:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + b"\0" * num_data_bytes


def entry(begin: int, end: int, **fields: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end], **fields}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "HTML page"),
        (pickle.dumps({"a": 1}), "pickle"),
        (b"PK\x03\x04" + b"\0" * 40, "pickle"),
        (b"\x01\x02\x03", "only 3 bytes"),
        (struct.pack("<Q", 1 << 60) + b"{}", "byte 0 claims a header"),
        (struct.pack("<Q", 4) + b"{}x}", "not JSON"),
        (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        (struct.pack("<Q", 4) + b"\xff\xff\xff\xff", "byte 8 of the header is not UTF-8"),
        (safetensors_bytes('{"a": {}, "a": {}}'), "'a' twice"),
        (safetensors_bytes({"a": {"dtype": "F32"}}), "'a': needs dtype"),
        (safetensors_bytes({"a": entry(0, 8, dtype="Q4")}), "unknown dtype 'Q4'"),
        (safetensors_bytes({"a": entry(0, 8, shape=[-2])}), "whole numbers"),
        (safetensors_bytes({"a": entry(0, 8, shape=[3])}), "takes 12"),
        (safetensors_bytes({"a": entry(0, 8), "b": entry(4, 8)}), "'b' overlaps"),
        (safetensors_bytes({"a": entry(4, 8)}), "'a' leaves a hole"),
        (safetensors_bytes({"a": entry(0, 16)}), "'a' ends at byte 16 of 8"),
        (safetensors_bytes({"a": entry(0, 4)}), "4 bytes follow"),
    ],
)
def test_damaged_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(BadWeights) as caught:
        read_header(path)

    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_truncation_of_a_good_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2)}, path)
    whole = path.read_bytes()
    assert set(read_header(path)) == {"a", "b"}

    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(BadWeights):
            read_header(path)


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
        (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"\[65\], expected \[64\] by hidden_size"),
        (lambda t: t.update({"model.embed_tokens.weight": torch.ones(8, 64)}), "by vocab_size"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "model.norm.weight is I8"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}), "biases"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], None], words: str
) -> None:
    folder = changed(make_checkpoint(tmp_path, "llama"), change)

    with pytest.raises(BadWeights, match=words):
        build_engine_model(folder, dtype=torch.float32)


def test_extra_tensors_are_only_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = changed(make_checkpoint(tmp_path, "llama"), lambda t: t.update({"unknown.weight": torch.ones(1)}))

    build_engine_model(folder, dtype=torch.float32)

    assert "unknown.weight" in caplog.text


def test_tied_embeddings_may_be_saved_twice_but_not_differ(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, "llama", tie_word_embeddings=True)
    changed(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    build_engine_model(folder, dtype=torch.float32)

    changed(folder, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(BadWeights, match="tie_word_embeddings"):
        build_engine_model(folder, dtype=torch.float32)


def test_progress_is_told_per_layer(llama_folder: Path) -> None:
    told: list[tuple[int, int]] = []

    build_engine_model(llama_folder, dtype=torch.float32, progress=lambda done, total: told.append((done, total)))

    assert told == [(1, 3), (2, 3), (3, 3)]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path, "llama", max_shard_size="100KB")


def test_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[0]
    lost.unlink()

    with pytest.raises(BadWeights, match=lost.name):
        Checkpoint(sharded)


def test_tensor_that_no_shard_holds_is_named(sharded: Path) -> None:
    index = json.loads((sharded / INDEX_NAME).read_text())
    index["weight_map"]["model.ghost"] = next(iter(index["weight_map"].values()))
    (sharded / INDEX_NAME).write_text(json.dumps(index))

    with pytest.raises(BadWeights, match=r"model\.ghost"):
        Checkpoint(sharded)


def test_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    name = next(iter(tensors))
    save_file({**load_file(second), name: tensors[name].clone()}, second)

    with pytest.raises(BadWeights, match="another shard"):
        Checkpoint(sharded)


def test_index_cannot_lead_out_of_the_folder(sharded: Path) -> None:
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))

    with pytest.raises(BadWeights, match="no file of this folder"):
        Checkpoint(sharded)
