"""No tensor of another device gets between those of the model: shown on torch's device without memory, `meta`.

Its tensors know shape and dtype, and arithmetic with a tensor of the CPU fails, as it does on a GPU; so a machine
without one can hold this. That a real GPU gives the same tokens: test_gpu_gate.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from engines.attention.backend import AttentionBackend, AttentionMetadata, AttentionRow
from engines.attention.generic_attention import GenericAttention
from engines.attention.padded_decode import PaddedDecodeAttention
from engines.attention.torch_backend import TorchAttention
from engines.attention.windowed import WindowedAttention
from engines.graphs.decode_inputs import DecodeInputs
from engines.models.config import ModelConfig
from engines.models.llama import LlamaModel
from engines.models.loader import load_weights
from engines.params import SamplingParams
from engines.sampling.adjust import adjust_logits
from engines.sampling.choose import Filters, choose
from engines.sampling.constrain import _mask_on_device
from engines.sampling.row import SamplingRow
from engines.staging import Staging
from tests.checkpoints import FAMILIES, make_checkpoint

DEVICE = "meta"
BLOCK_SIZE, NUM_BLOCKS = 8, 16


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_chunks_and_decode_rows_stays_on_the_device(family: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, family)
    config = ModelConfig.from_folder(folder)
    rows = (AttentionRow(0, 20, [3, 1, 5]), AttentionRow(8, 9, [2, 4, 6]), AttentionRow(11, 1, [7, 8]))
    num_tokens = sum(row.num_new_tokens for row in rows)
    with torch.inference_mode():
        model = LlamaModel(config, load_weights(folder, config, dtype=torch.float32, device=DEVICE))
        shape = (NUM_BLOCKS, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        attention = TorchAttention(torch.empty(shape, device=DEVICE))
        attention.begin_step(AttentionMetadata(rows, torch.arange(num_tokens, device=DEVICE)))
        ids = torch.zeros(num_tokens, dtype=torch.int64, device=DEVICE)
        logits = model.logits(model.forward(ids, ids, attention))

    assert (logits.device.type, tuple(logits.shape)) == (DEVICE, (num_tokens, config.vocab_size))


def test_biases_and_masks_stay_on_the_device() -> None:
    params = SamplingParams(
        logit_bias={5: 1.0},
        allowed_token_ids=(1, 2),
        bad_word_ids=((3,),),
        min_tokens=4,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=0.5,
    )
    row = SamplingRow(params, 0, 0, [7, 8], [9])
    logits = torch.empty(1, 300, device=DEVICE)
    adjust_logits(logits, {0: row}, (2,))

    assert logits.device.type == DEVICE


@pytest.mark.parametrize("kind", ["generic", "windowed"])
def test_attention_with_windows_stays_on_the_device(kind: str) -> None:
    rows = (AttentionRow(0, 20, [3, 1, 5]), AttentionRow(8, 9, [2, 4, 6]), AttentionRow(11, 1, [7, 8]))
    kv = torch.empty(NUM_BLOCKS, 2, 2, 2, BLOCK_SIZE, 16, device=DEVICE)
    attention: AttentionBackend = GenericAttention(kv)
    if kind == "windowed":
        attention = WindowedAttention(lambda: TorchAttention(kv), kv, (None, 13))
    states = torch.empty(30, 2, 16, device=DEVICE)
    attention.begin_step(AttentionMetadata(rows, torch.arange(30, device=DEVICE)))
    for layer in range(2):
        attention.write_kv(layer, states, states)
        out = attention.forward(layer, torch.empty(30, 4, 16, device=DEVICE))
        assert (out.device.type, tuple(out.shape)) == (DEVICE, (30, 4, 16))


def test_grammar_masks_are_applied_on_the_device_as_on_a_cpu() -> None:
    forbidden = np.random.default_rng(0).integers(0, 256, (2, 38), dtype=np.uint8)
    logits = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    bits = torch.from_numpy(np.unpackbits(forbidden, axis=1, bitorder="little"))[:, :300].bool()
    expected = logits.clone()
    expected[[0, 2]] = expected[[0, 2]].masked_fill(bits, float("-inf"))
    on_device = torch.empty(3, 300, device=DEVICE)

    _mask_on_device(logits, [0, 2], forbidden)
    _mask_on_device(on_device, [0, 2], forbidden)

    assert torch.equal(logits, expected)
    assert on_device.device.type == DEVICE


def test_the_choice_is_made_on_the_device() -> None:
    filters = Filters(
        temperature=torch.ones(3, dtype=torch.float64),
        top_k=torch.zeros(3, dtype=torch.int64),
        top_p=torch.ones(3, dtype=torch.float64),
        min_p=torch.zeros(3, dtype=torch.float64),
        uniform=torch.zeros(3, dtype=torch.float64),
    )
    chosen = choose(torch.empty(3, 40, device=DEVICE), filters)

    assert (chosen.device.type, tuple(chosen.shape)) == (DEVICE, (3,))


def test_two_devices_in_one_operation_are_seen() -> None:
    with pytest.raises(RuntimeError, match="device"):
        torch.empty(3, device=DEVICE) + torch.empty(3)


def test_a_padded_decode_step_stays_on_the_device() -> None:
    kv = torch.empty(NUM_BLOCKS, 2, 2, 2, BLOCK_SIZE, 16, device=DEVICE)
    inputs = DecodeInputs(
        num_rows=4, num_pages=4, block_size=BLOCK_SIZE, scratch_block=NUM_BLOCKS - 1, device=torch.device(DEVICE)
    )
    inputs.load_padding(Staging(DEVICE))
    attention = PaddedDecodeAttention(kv, inputs)
    attention.begin()
    for layer in range(2):
        states = torch.empty(4, 2, 16, device=DEVICE)
        attention.write_kv(layer, states, states)
        out = attention.forward(layer, torch.empty(4, 6, 16, device=DEVICE))
        assert (out.device.type, tuple(out.shape)) == (DEVICE, (4, 6, 16))


def test_numbers_of_a_step_leave_in_one_piece_and_arrive_apart() -> None:
    ids, slots = np.arange(3), np.arange(5, 7)
    there = Staging(DEVICE).send(ids, slots)
    assert [(each.device.type, len(each)) for each in there] == [(DEVICE, 3), (DEVICE, 2)]
    target = torch.empty(5, dtype=torch.int64)
    staging = Staging("cpu")
    staging.fill(target, slots, ids)
    staging.fill(target[:2], slots + 1)  # the room is larger than that
    assert target.tolist() == [6, 7, 0, 1, 2]
