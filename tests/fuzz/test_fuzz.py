"""A few seconds of the fuzzer with each run of the tests; `make fuzz` is the long form."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel here")


def test_no_input_of_a_short_run_breaks_a_promise_of_the_receiver() -> None:
    from tests.fuzz.__main__ import fuzz

    assert fuzz(seconds=4) > 100
