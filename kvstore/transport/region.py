"""Shared memory for KV blocks: a memfd with no name to guess, mapped by its engine and by writers it was passed to.

    memfd: | block 0: layer 0 | layer 1 | ... | block 1: layer 0 | ...       one block is one contiguous run

Layers [lo, hi) of a block are the run lo * layer_bytes .. hi * layer_bytes within it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import weakref
from functools import cached_property

from kvstore.native.pages import PageOps, Pages, page_ops
from kvstore.transport.errors import RegionError
from kvstore.transport.memory import HOST

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class KVRegion:
    """One mapping of a region. The maker's and each peer's mapping show the same bytes.

    Attributes:
        fd: the memfd. Whoever holds it can read and write all blocks.
        buffer: `num_blocks * block_bytes` bytes, writable.
        address: of the first byte, in this process.
        pages: the same for `kvstore.native`.
    """

    kind = HOST

    def __init__(self, fd: int, *, num_blocks: int, num_layers: int, layer_bytes: int) -> None:
        """Map `fd`, which must be at least as large as the blocks. Owns `fd` from here on."""
        self.fd = fd
        self.num_blocks = num_blocks
        self.num_layers = num_layers
        self.layer_bytes = layer_bytes
        self.block_bytes = num_layers * layer_bytes
        self.num_bytes = num_blocks * self.block_bytes
        self._mmap = mmap.mmap(fd, self.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with contextlib.suppress(OSError, AttributeError):  # a hint: kernels without huge shared pages say no
            self._mmap.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self._mmap)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mmap))
        self.pages = Pages(self.address, num_blocks, num_layers, layer_bytes)
        # Last, since on an error `fd` is the caller's. A region that nobody closes must not keep its memory for ever.
        self._closing = weakref.finalize(self, os.close, fd)
        self._closing.atexit = False

    @classmethod
    def create(cls, num_blocks: int, num_layers: int, layer_bytes: int) -> KVRegion:
        """A new zeroed region, sealed against resizing, so that no peer can make a mapping of it fault.

        Raises:
            RegionError: the sizes make no region, or the memory is not there.
        """
        if min(num_blocks, num_layers, layer_bytes) < 1:
            sizes = f"{num_blocks} blocks of {num_layers} layers of {layer_bytes} bytes"
            raise RegionError(what=f"asked for {sizes}", expected="at least 1 of each")
        fd = os.memfd_create("celeriac-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_blocks * num_layers * layer_bytes)
            region = cls(fd, num_blocks=num_blocks, num_layers=num_layers, layer_bytes=layer_bytes)
        except OSError as error:
            os.close(fd)
            size = num_blocks * num_layers * layer_bytes
            raise RegionError(what=f"{size} bytes: {error.strerror}", expected="that much shared memory") from error
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return region

    @classmethod
    def attach(cls, fd: int, *, num_blocks: int, num_layers: int, layer_bytes: int) -> KVRegion:
        """Map a peer's region. Checks what the peer said before anything is mapped; owns `fd`, also on failure.

        Raises:
            RegionError: the size is another one, or the region could shrink under our feet.
        """
        expected = num_blocks * num_layers * layer_bytes
        try:
            size, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            if size != expected or expected < 1:
                raise RegionError(what=f"the peer passed {size} bytes", expected=f"the {expected} it announced")
            if not seals & fcntl.F_SEAL_SHRINK:
                raise RegionError(what="the peer passed memory that may shrink", expected="a sealed memfd")
            return cls(fd, num_blocks=num_blocks, num_layers=num_layers, layer_bytes=layer_bytes)
        except OSError as error:
            os.close(fd)
            raise RegionError(what=f"cannot be mapped: {error.strerror}", expected="a sealed memfd") from error
        except RegionError:
            os.close(fd)
            raise

    @cached_property
    def ops(self) -> PageOps:
        """What copies and hashes these blocks. The first use on a machine compiles it: some seconds."""
        return page_ops(self.layer_bytes)

    def run(self, block_id: int, layer_lo: int, layer_hi: int) -> memoryview:
        """Bytes of layers [lo, hi) of a block."""
        start = block_id * self.block_bytes
        return self.buffer[start + layer_lo * self.layer_bytes : start + layer_hi * self.layer_bytes]

    def block(self, block_id: int) -> memoryview:
        return self.run(block_id, 0, self.num_layers)

    def drain(self) -> None:
        """Nothing copies from here but threads of UCX, which end with their agent."""

    def close(self) -> None:
        """Drop the descriptor and our view. The pages go when nothing maps them: a tensor may still do so."""
        with contextlib.suppress(BufferError):
            self.buffer.release()
            self._mmap.close()
        self._closing()
        self.fd = -1
