"""The header of a safetensors file, checked before anything maps or allocates what it claims. No torch.

    [ 8 bytes: header length, little-endian ][ JSON header ][ tensor bytes ........................ ]
    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, "__metadata__": {...}}

The tensors must tile the data exactly: no overlap, no hole, nothing beyond the end.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from engines.errors import BadWeights

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
DTYPE_BYTES: Final = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "C64": 8,
}
_AGAIN: Final = "Download the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file; `begin` and `end` count from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """All tensors that `path` holds, by name. Reads the header only.

    Raises:
        BadWeights: not a safetensors file, damaged, or truncated; the message gives the byte or the tensor.
    """
    try:
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            head = file.read(8)
            _refuse_lookalikes(path, head + file.read(56))
            if len(head) < 8:
                raise BadWeights(path, f"only {file_bytes} bytes, byte 0 begins no header", f"{_AGAIN}.")
            length = int.from_bytes(head, "little")
            if length > MAX_HEADER_BYTES or 8 + length > file_bytes:
                raise BadWeights(
                    path,
                    f"byte 0 claims a header of {length} bytes in a file of {file_bytes} bytes",
                    f"Expected at most {MAX_HEADER_BYTES} and no more than the file. {_AGAIN}, it may be cut off.",
                )
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise BadWeights(path, f"cannot be read ({error})", "Check the link and its permissions.") from error
    entries = [_entry(path, name, fields) for name, fields in _parse(path, raw).items() if name != "__metadata__"]
    _check_tiling(path, entries, file_bytes - 8 - length)
    return {entry.name: entry for entry in entries}


def _refuse_lookalikes(path: Path, head: bytes) -> None:
    """What often lies under the name of weights. Pickles are told by their magic and never opened."""
    what = ""
    if not head:
        what = "an empty file"
    elif head.startswith(b"version https://git-lfs"):
        what = "a Git LFS pointer"
    elif head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        what = "an HTML page"
    elif head.startswith(b"PK\x03\x04") or (head[0] == 0x80 and head[1:2] in b"\x02\x03\x04\x05" and head[8:9] != b"{"):
        what = "a pickle, which could run code"
    if what:
        raise BadWeights(path, f"this is {what}, not the weights", f"{_AGAIN} (a Git clone needs `git lfs pull`).")


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = dict(pairs)
        if len(names) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise BadWeights(path, f"the header names {twice!r} twice", f"Expected each name once. {_AGAIN}.")
        return names

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise BadWeights(path, f"byte {8 + error.start} of the header is not UTF-8", f"{_AGAIN}.") from error
    except json.JSONDecodeError as error:
        raise BadWeights(path, f"byte {8 + error.pos} of the header is not JSON ({error.msg})", f"{_AGAIN}.") from error
    except RecursionError as error:
        raise BadWeights(path, "byte 8: the header is nested too deeply", f"{_AGAIN}.") from error
    if not isinstance(header, dict):
        raise BadWeights(path, "byte 8: the header is no JSON object", f"{_AGAIN}.")
    return header


def _entry(path: Path, name: str, fields: Any) -> TensorEntry:
    def bad(problem: str) -> BadWeights:
        return BadWeights(path, f"tensor {name!r}: {problem}", f"{_AGAIN}, or save the model again.")

    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise bad("needs dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise bad(f"unknown dtype {dtype!r}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise bad(f"shape {shape!r} and data_offsets {offsets!r} must be lists of whole numbers >= 0")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise bad(f"data_offsets {offsets} hold {offsets[1] - offsets[0]} bytes, {dtype} {shape} takes {num_bytes}")
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_tiling(path: Path, entries: list[TensorEntry], data_bytes: int) -> None:
    end = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != end:
            what = "overlaps the tensor before it" if entry.begin < end else "leaves a hole before it"
            raise BadWeights(path, f"tensor {entry.name!r} {what} (byte {entry.begin}, not {end})", f"{_AGAIN}.")
        if entry.end > data_bytes:
            raise BadWeights(
                path,
                f"tensor {entry.name!r} ends at byte {entry.end} of {data_bytes}",
                f"The file is cut off. {_AGAIN}.",
            )
        end = entry.end
    if end != data_bytes:
        raise BadWeights(path, f"{data_bytes - end} bytes follow the last tensor", f"{_AGAIN}.")
