"""Whether bfloat16 linears run on AMX tiles, and why not.

Asked once per process: C++ looks at the CPU, asks the kernel for permission, and multiplies small matrices in a child
process, whose bits must be those of the emulation (cpp/amx_check.h). Whatever fails, the engine goes on without AMX.

For tests, `CELERIAC_AMX=emulate` in the environment puts linears on the emulation, on any CPU, slowly; the bits are
those of AMX. `CELERIAC_AMX=off` leaves AMX alone. No setting: where AMX works there is no reason to choose.
"""

from __future__ import annotations

import logging
import os
from enum import IntEnum
from typing import Final

import torch

from engines.ext.library import Kernels

logger = logging.getLogger(__name__)

VARIABLE: Final = "CELERIAC_AMX"


class Tiles(IntEnum):
    """What multiplies weights packed for tiles: two values of `enum class Kind` of cpp/formats.h."""

    AMX = 3
    EMULATED = 4


# `enum class AmxState` of cpp/amx_check.h, by number. Empty: as on any CPU without AMX, which nobody needs to be told.
_WHY_NOT: Final = (
    "",
    "",
    "",
    "the operating system does not keep its tiles",
    "the kernel refuses permission (arch_prctl)",
    "the self-check was ended by a signal",
    "the self-check gave other bits than Intel documents",
)
READY: Final = 0


def find_tiles(kernels: Kernels) -> Tiles | None:
    """What bfloat16 weights are to be packed for; None: not for tiles. Blocks for some milliseconds the first time.

    One log line says so where a CPU has AMX that cannot be used.
    """
    asked = os.environ.get(VARIABLE, "")
    if kernels.dtype != torch.bfloat16 or asked == "off":
        return None
    if asked == "emulate":
        return Tiles.EMULATED if kernels.has_emulated_tiles() else None
    state = kernels.find_amx()
    if state != READY and _WHY_NOT[state]:
        logger.warning("AMX is not used: %s. Linear layers run on AVX-512.", _WHY_NOT[state])
    return Tiles.AMX if state == READY else None
