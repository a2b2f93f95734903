"""Evicted blocks on disk: one file per block, named by its content hash, so that a restarted worker finds them again.

    <folder>/<fingerprint>/<first byte of the key>/<key>.kv        header | bytes of the block

A file appears whole (written aside, then renamed) or not at all. The fingerprint names the model, the dtype and the
layout: KV of another one is never looked at. A folder has one owner at a time, by a lock on its `lock` file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import xxhash

from kvstore.tiers.errors import TierError

_HEADER = struct.Struct("<8s16sQQ")  # magic, key, bytes of the block, their xxh3_64
_MAGIC = b"CELKV\x00\x00\x01"


class DiskTier:
    """Owned by one thread. The oldest in use go first when the folder holds `max_bytes`.

    Args:
        folder: made if it is not there, readable by this user only.
        fingerprint: of everything that makes KV what it is besides its tokens.

    Raises:
        TierError: the folder cannot be used, or another process uses it.
    """

    def __init__(self, folder: Path, *, fingerprint: str, max_bytes: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.max_blocks = max_bytes // (block_bytes + _HEADER.size)
        if self.max_blocks < 1:
            raise TierError(what=f"{max_bytes} bytes of disk", expected=f"at least one block of {block_bytes}")
        self.num_damaged = 0
        self.on_forget: Callable[[bytes], None] = lambda _key: None  # called for each key that is here no more
        self._folder = folder / fingerprint
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise TierError(
                what=f"{self._folder}: {error.strerror}", expected="a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise TierError(
                what=f"{self._folder} is in use by another worker", expected="a folder of its own"
            ) from error
        self._keys: OrderedDict[bytes, None] = OrderedDict.fromkeys(self._scan())
        self._trim()

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def keys(self) -> list[bytes]:
        """The longest unused first."""
        return list(self._keys)

    def put(self, key: bytes, pages: bytes) -> bool:
        """Keep `pages`. False: the disk did not take them, and holds what it held before."""
        if key in self._keys:
            self._keys.move_to_end(key)
            return True
        path = self._path(key)
        aside = path.with_suffix(".part")
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(_HEADER.pack(_MAGIC, key, len(pages), xxhash.xxh3_64_intdigest(pages)))
                file.write(pages)
            aside.replace(path)  # no fsync: after a power cut a torn block fails its checksum
        except OSError:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            return False
        self._keys[key] = None
        self._trim()
        return True

    def read(self, key: bytes) -> bytes | None:
        """A block, or None: not here, or damaged; then it is forgotten."""
        if key not in self._keys:
            return None
        try:
            content = self._path(key).read_bytes()
        except OSError:
            content = b""
        if len(content) == _HEADER.size + self.block_bytes:
            magic, own_key, num_bytes, digest = _HEADER.unpack_from(content)
            pages = content[_HEADER.size :]
            if (magic, own_key, num_bytes) == (_MAGIC, key, len(pages)) and digest == xxhash.xxh3_64_intdigest(pages):
                self._keys.move_to_end(key)
                return pages
        self.num_damaged += 1
        self._remove(key)
        return None

    def close(self) -> None:
        """Give the folder free. The blocks stay."""
        os.close(self._lock)

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}.kv"

    def _scan(self) -> list[bytes]:
        """Keys of whole files, the longest unused first; what a crash left half written is removed."""
        found: list[tuple[float, bytes]] = []
        for path in self._folder.glob("??/*"):
            try:
                status = path.stat()
                if path.suffix != ".kv" or status.st_size != _HEADER.size + self.block_bytes:
                    path.unlink()
                    continue
                found.append((status.st_mtime, bytes.fromhex(path.stem)))
            except (OSError, ValueError):
                continue
        return [key for _, key in sorted(found)]

    def _trim(self) -> None:
        while len(self._keys) > self.max_blocks:
            self._remove(next(iter(self._keys)))

    def _remove(self, key: bytes) -> None:
        del self._keys[key]
        with contextlib.suppress(OSError):
            self._path(key).unlink(missing_ok=True)
        self.on_forget(key)
