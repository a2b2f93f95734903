"""The function library `celeriac1` as text: one file per idea in `lua/`, concatenated here.

The library's and the functions' names carry the protocol's version, so that two versions live side by side while a
cluster is upgraded. `BUILD` in the text counts changes within a version: a process replaces an older build, never a
newer one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

PARTS: Final = ("base.lua", "requests.lua", "tokens.lua", "reaper.lua", "registry.lua")
TEST_CLOCK_KEY: Final = "cel:clock"


@dataclass(frozen=True)
class Library:
    """One version of the functions. `name` prefixes each function: `<name>_accept`."""

    name: str
    source: str

    @property
    def build(self) -> int:
        return build_of(self.source)


@cache
def production() -> Library:
    """The library that every process of this version loads."""
    folder = files("kvstore.state").joinpath("lua")
    return Library("celeriac1", "".join(folder.joinpath(part).read_text() for part in PARTS))


@cache
def with_test_clock() -> Library:
    """The same text under the name `celeriac1t`, on a clock that a test moves: the string `cel:clock`, in ms.

    For storms in virtual time only. It is another library, so a server can hold both and they never mix.
    """
    real = production()
    clock = f"local function now_ms()\n  return tonumber(redis.call('GET', '{TEST_CLOCK_KEY}') or 0)\nend\n"
    source, replaced = re.subn(
        r"^-- clock: begin.*?^-- clock: end$", lambda _: clock, real.source, flags=re.DOTALL | re.MULTILINE
    )
    assert replaced == 1, "lua/base.lua has lost its clock markers"
    return Library("celeriac1t", source.replace("celeriac1", "celeriac1t"))


def build_of(source: str) -> int:
    """The build number in a library's text; 0 if it has none."""
    match = re.search(r"^local BUILD = (\d+)$", source, re.MULTILINE)
    return int(match.group(1)) if match else 0
