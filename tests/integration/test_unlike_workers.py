"""A prefill and a decode engine that keep KV differently serve together; those that cannot are named by the dry run."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from engines.kv_region import KVTensor
from engines.messages import Arrived, Peers, Target
from kvstore.reshard import KVLayout
from kvstore.transport import KVNode, KVRegion
from tests.checkpoints import make_checkpoint
from tests.cluster import TINY_CHAT
from tests.engine_pair import SECRET, EnginePair

PROMPTS = [json.loads(line) for line in (TINY_CHAT / "prompts.jsonl").read_text().splitlines()]
LONGEST = max(PROMPTS, key=lambda prompt: len(prompt["prompt_ids"]))
BLOCKS = [("16", "32"), ("32", "16"), ("8", "64")]


@contextlib.contextmanager
def _engines(
    tmp_path: Path, protocol: str, prefill: Mapping[str, str], decode: Mapping[str, str], decode_blocks: int = 0
) -> Iterator[EnginePair]:
    pair = EnginePair(
        tmp_path, TINY_CHAT, protocol=protocol, flags=prefill, decode_flags=decode, decode_blocks=decode_blocks
    )
    try:
        yield pair
    finally:
        pair.close()


def _kv(pair: EnginePair, role: str) -> torch.Tensor:
    region: KVTensor = pair.halves[role].engine.core._runner._region
    return region.kv


def _tokens_alike(pair: EnginePair, num_tokens: int) -> float:
    """Share of the prompts whose tokens are those of the gate."""
    for half in pair.halves.values():
        half.tokens.clear()
        half.finished.clear()
    for k, prompt in enumerate(PROMPTS):
        pair.add(f"r{k}", prompt["prompt_ids"], max_tokens=num_tokens)
    pair.run(lambda: len(pair.decode.finished) + len(pair.prefill.finished) >= len(PROMPTS), timeout_s=120)
    right = [pair.output(f"r{k}") == prompt["completion_ids"][:num_tokens] for k, prompt in enumerate(PROMPTS)]
    return sum(right) / len(right)


@pytest.mark.parametrize("protocol", ["shm", "tcp"])
@pytest.mark.parametrize(("ours", "theirs"), BLOCKS)
def test_blocks_of_another_size_give_the_same_tokens(tmp_path: Path, protocol: str, ours: str, theirs: str) -> None:
    with _engines(tmp_path, protocol, {"kv.block_size": ours}, {"kv.block_size": theirs}) as pair:
        for role in ("prefill", "decode"):
            _kv(pair, role).fill_(float("nan"))
        assert _tokens_alike(pair, 24) == 1.0
        assert _tokens_alike(pair, 16) == 1.0, "out of the prefix cache"


def test_choices_share_the_blocks_that_were_made_for_the_receiver(tmp_path: Path) -> None:
    with _engines(tmp_path, "tcp", {"kv.block_size": "16"}, {"kv.block_size": "32"}) as pair:
        pair.add("r", LONGEST["prompt_ids"], n=3, max_tokens=8)
        pair.run(lambda: all(("r", c) in pair.decode.finished for c in range(3)))
        assert [pair.output("r", c) for c in range(3)] == [LONGEST["completion_ids"][:8]] * 3


def test_a_grant_is_counted_in_the_receivers_blocks(tmp_path: Path) -> None:
    """The decode pool has just the blocks for the longest sequence; counted in blocks of 64 it would not fit."""
    flags = {"model.max_model_len": "1500"}
    decode = {"kv.block_size": "16"}
    with _engines(tmp_path, "shm", {"kv.block_size": "64", **flags}, {**decode, **flags}, decode_blocks=94) as pair:
        prompt_ids = (LONGEST["prompt_ids"] * 2)[:1490]
        granted: list[int] = []

        def look(arrived: Arrived) -> bool:
            granted.append(len(pair.decode.engine.core._reader._arrivals[arrived.xfer].blocks))
            return True

        pair.on_arrived = look
        pair.add("r", prompt_ids, max_tokens=10, ignore_eos=True)
        pair.run(lambda: bool(pair.decode.finished))
        assert granted == [94]
        assert len(pair.output("r")) == 10


@pytest.mark.parametrize("protocol", ["shm", "tcp"])
def test_bfloat16_kv_decodes_in_float32_and_is_the_same_numbers(tmp_path: Path, protocol: str) -> None:
    """Only the prompt is computed in bfloat16: a few prompts may take another way where two tokens are close."""
    prefill = {"model.dtype": "bfloat16", "kv.block_size": "16"}
    with _engines(tmp_path, protocol, prefill, {"model.dtype": "float32"}) as pair:
        arrived: list[torch.Tensor] = []

        def look(message: Arrived) -> bool:
            arrival = pair.decode.engine.core._reader._arrivals[message.xfer]
            blocks = _kv(pair, "decode")[arrival.blocks]
            arrived.append(torch.cat(list(blocks), dim=3)[:, :, :, : arrival.num_tokens].clone())
            return True

        pair.on_arrived = look
        pair.add("probe", LONGEST["prompt_ids"], max_tokens=2)
        pair.run(lambda: bool(arrived))
        (kv,) = arrived
        assert torch.equal(kv, kv.to(torch.bfloat16).float()), "widening is exact, so nothing but bfloat16 can be there"
        assert len(torch.unique(kv)) > 1000
        pair.run(lambda: bool(pair.decode.finished))
        pair.on_arrived = lambda _: True
        pair.decode.finished.clear()
        assert _tokens_alike(pair, 24) >= 0.85


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_compressed_kv_changes_few_tokens(tmp_path: Path, kind: str) -> None:
    """What was measured stands in docs/transfer.md; the floor here is lower."""
    with _engines(tmp_path, "tcp", {"transfer.compression": kind}, {}) as pair:
        assert _tokens_alike(pair, 24) >= {"int8": 0.9, "fp8": 0.75}[kind]
        raw = sum(len(prompt["prompt_ids"]) for prompt in PROMPTS)
        assert pair.prefill.engine.node.counters()["sent_bytes"] < raw * 6 * 2 * 2 * 32 * 4


def test_a_dry_run_goes_through_between_blocks_of_unlike_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        _engines(tmp_path, "tcp", {"kv.block_size": "32"}, {"kv.block_size": "16"}) as pair,
        caplog.at_level(logging.INFO),
    ):
        pair.prefill.engine.core.handle(Peers([pair.target]))
        pair.run(lambda: "every byte arrived" in caplog.text)
        pair.run(lambda: not pair.blocks_in_use())


def test_what_cannot_be_converted_is_named_at_join_time_with_the_values_of_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layout = KVLayout(
        num_layers=6, num_kv_heads=2, head_lo=0, head_hi=2, block_size=32, head_dim=64, dtype="float32"
    )  # fmt: skip
    with _engines(tmp_path, "shm", {}, {}) as pair:
        region = KVRegion.create(4, layout.num_layers, layout.layer_bytes)
        node = KVNode(
            incarnation="other",
            region=region,
            secret=SECRET,
            compat=pair.decode.engine.address.compat,
            protocols=("shm",),
            run_dir=str(tmp_path),
            layout=layout,
        )
        try:
            pair.prefill.engine.core.handle(Peers([Target("other@h", node.start()), pair.target]))
            pair.run(lambda: "other@h failed" in caplog.text)
        finally:
            node.stop()
        assert "(layout) (head_dim: writer has 32, receiver has 64)" in caplog.text
        assert [target.node for target in pair.prefill.engine.core._dry_runs.usable] == ["d"]


def test_another_model_is_named_at_join_time_with_both_digests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = make_checkpoint(tmp_path / "model", "llama")
    with _engines(tmp_path, "tcp", {}, {"model.path": str(other)}) as pair:
        pair.prefill.engine.core.handle(Peers([pair.target]))
        pair.run(lambda: "d failed (incompatible)" in caplog.text)
        ours, theirs = (half.engine.address.compat for half in (pair.prefill, pair.decode))
        assert f"writer has {ours}, receiver {theirs}" in caplog.text


def test_another_quantisation_is_named_at_join_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with _engines(tmp_path, "tcp", {"engine.quantization": "int8"}, {"engine.quantization": "int4"}) as pair:
        pair.prefill.engine.core.handle(Peers([pair.target]))
        pair.run(lambda: "d failed (incompatible)" in caplog.text)
        assert "quantization=int8 " in caplog.text and "quantization=int4/64 " in caplog.text


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_workers_give_a_prompt_the_same_tokens_alone_and_among_others(
    tmp_path: Path, quantization: str
) -> None:
    with _engines(
        tmp_path, "shm", flags := {"engine.quantization": quantization, "model.dtype": "bfloat16"}, flags
    ) as pair:
        _tokens_alike(pair, 24)
        together = [pair.output(f"r{k}") for k in range(len(PROMPTS))]
        for k in range(0, len(PROMPTS), 8):
            pair.add(f"alone{k}", PROMPTS[k]["prompt_ids"], max_tokens=24)
            pair.run(lambda k=k: any((f"alone{k}", 0) in half.finished for half in (pair.prefill, pair.decode)))  # type: ignore[misc]
            assert pair.output(f"alone{k}") == together[k]
