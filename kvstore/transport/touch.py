"""Have the kernel make the pages of a region at the start of an engine, not at its first transfers.

Runs beside the loading of the model, in a thread of its own and in slices. It stops where the machine's memory gets
short: pages that nobody has used yet are not worth another program's.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from pathlib import Path
from typing import Final

from kvstore.transport.region import KVRegion

logger = logging.getLogger(__name__)

SLICE_BYTES: Final = 32 << 20
MIN_AVAILABLE: Final = 0.25  # of the machine's memory
MADV_POPULATE_WRITE: Final = 23  # Linux 5.14


def start_touching(region: KVRegion) -> threading.Thread:
    """Touch all pages of `region` in the background; the log says how long that took. What pages hold stays."""
    thread = threading.Thread(target=_touch, args=(region,), name="kv-touch", daemon=True)
    thread.start()
    return thread


def _touch(region: KVRegion) -> None:
    libc, start_s = ctypes.CDLL(None, use_errno=True), time.monotonic()
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for offset in range(0, region.num_bytes, SLICE_BYTES):
        if available_share() < MIN_AVAILABLE:
            logger.info("KV region: %d of %d MiB touched, then memory got short", offset >> 20, region.num_bytes >> 20)
            return
        num_bytes = min(SLICE_BYTES, region.num_bytes - offset)
        if libc.madvise(region.address + offset, num_bytes, MADV_POPULATE_WRITE):  # without the GIL
            reason = os.strerror(ctypes.get_errno())
            logger.info("KV region: pages are made at their first use (%s)", reason)
            return
    logger.info("KV region: %d MiB touched in %.2f s", region.num_bytes >> 20, time.monotonic() - start_s)


def available_share() -> float:
    """Of the machine's memory, what could be had without swapping; 1.0 where the kernel does not say."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) / int(lines["MemTotal"].split()[0])
    except (OSError, KeyError, ValueError):
        return 1.0
