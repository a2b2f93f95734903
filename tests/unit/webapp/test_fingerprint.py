"""`system_fingerprint` says what the workers compute with, and whether tokens depend on nothing but the request."""

from __future__ import annotations

from typing import Any

import pytest

from configs.schema import ModelSettings
from kvstore.address import KVAddress
from kvstore.state.records import WorkerBeat
from tests.gateway_harness import TINY_CHAT
from webapp.openai.served_model import ServedModel, load_served_model


@pytest.fixture(scope="module")
def model() -> ServedModel:
    return load_served_model(ModelSettings(path=str(TINY_CHAT)), version="test")


def beat(**given: Any) -> WorkerBeat:
    said: dict[str, Any] = {
        "model": "tiny-chat",
        "dtype": "bfloat16",
        "compat": "c",
        "repeatability": "exact",
        "role": "decode",
    }
    address = KVAddress(incarnation="w-1", host_id="h", unix_path="", compat="c")
    return WorkerBeat(incarnation="w-1", node="w", address=address, **(said | given))


def test_exact_workers_that_compute_alike_make_it_exact(model: ServedModel) -> None:
    served = model.as_served_by([beat(), beat(role="prefill"), beat(model="another", repeatability="best-effort")])

    assert served.fingerprint.startswith("fp_") and served.fingerprint.endswith("-exact")
    assert served.as_served_by([beat()]).fingerprint == served.fingerprint
    tiled = model.as_served_by([beat(repeatability="exact-on-tiles")] * 2).fingerprint
    assert tiled.endswith("-exact") and tiled != served.fingerprint


@pytest.mark.parametrize(
    "beats",
    [
        [],
        [beat(), beat(repeatability="best-effort")],
        [beat(), beat(repeatability="exact-on-tiles")],
        [beat(), beat(dtype="float32")],
        [beat(), beat(compat="quantization=int8")],
    ],
)
def test_a_worker_that_differs_makes_it_best_effort(model: ServedModel, beats: list[WorkerBeat]) -> None:
    assert model.as_served_by(beats).fingerprint.endswith("-best-effort")


def test_other_weights_another_dtype_and_another_version_are_other_fingerprints(model: ServedModel) -> None:
    other = load_served_model(ModelSettings(path=str(TINY_CHAT)), version="other")
    served = [model.as_served_by(beats) for beats in ([beat()], [beat(dtype="float32")], [beat(compat="d")])]

    assert len({each.fingerprint for each in [*served, other.as_served_by([beat()])]}) == 4
