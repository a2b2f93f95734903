from __future__ import annotations

import re
import subprocess
import sys

from kvstore.state.keys import live_key
from kvstore.state.library import TEST_CLOCK_KEY, build_of, production, with_test_clock


def test_test_library_differs_only_in_its_name_and_its_clock() -> None:
    ours = production().source.replace("celeriac1", "celeriac1t").splitlines()
    tests = with_test_clock().source.splitlines()

    assert [line for line in tests if line not in ours] == [
        f"  return tonumber(redis.call('GET', '{TEST_CLOCK_KEY}') or 0)"
    ]
    assert TEST_CLOCK_KEY not in production().source


def test_every_function_carries_the_version_in_its_name() -> None:
    names = re.findall(r"function_name = '(\w+)'", production().source)

    assert len(names) == len(set(names)) >= 14
    assert all(name.startswith("celeriac1_") for name in names)


def test_build_of_a_foreign_text_is_zero() -> None:
    assert production().build == build_of(production().source) >= 1
    assert build_of("#!lua name=other") == 0


def test_every_key_of_the_library_is_described_in_its_header() -> None:
    source = production().source
    header = source[: source.index("local BUILD")]

    for name in set(re.findall(r"ctx\.p \.\. '(\w+)", source)):
        assert f":{name}" in header, name
    assert live_key(0) == "cel:{s00}:live"


def test_formats_come_without_redis_py() -> None:
    program = "import sys, kvstore.state.entries, kvstore.state; sys.exit('redis' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
