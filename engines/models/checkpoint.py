"""The safetensors files of a folder as one set of named tensors: a single file, or the shards of an index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from torch import Tensor

from engines.errors import BadWeights
from engines.models.safetensors_header import TensorEntry, read_header

INDEX_NAME: Final = "model.safetensors.index.json"
MAX_NAMES: Final = 20  # in a message


def short_list(names: list[str]) -> str:
    """Up to 20 names and how many there are."""
    shown = ", ".join(names[:MAX_NAMES])
    return f"{len(names)}: {shown}" + (", ..." if len(names) > MAX_NAMES else "")


class Checkpoint:
    """Headers checked, files mapped (not read) until a tensor is taken. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BadWeights: no weights, a damaged file, or an index that does not agree with its shards.
        """
        self.folder = folder
        self._paths: dict[str, Path] = {}
        self.entries: dict[str, TensorEntry] = {}
        self._open: dict[Path, Any] = {}
        index_path = folder / INDEX_NAME
        names_by_file = _read_index(index_path) if index_path.exists() else _single_file(folder)
        for file_name, listed in names_by_file.items():
            self._add_file(folder / file_name, listed)

    def _add_file(self, path: Path, listed: set[str] | None) -> None:
        entries = read_header(path)
        if listed is not None and (lost := sorted(listed - entries.keys())):
            raise BadWeights(
                self.folder / INDEX_NAME,
                f"tensors that {path.name} should hold are not there ({short_list(lost)})",
                "Download index and shards again, from one revision.",
            )
        if twice := sorted(entries.keys() & self.entries.keys()):
            raise BadWeights(
                path, f"tensors are in another shard, too ({short_list(twice)})", "Keep one set of shards."
            )
        self.entries.update(entries)
        self._paths.update(dict.fromkeys(entries, path))

    def path_of(self, name: str) -> Path:
        return self._paths.get(name, self.folder)

    def take(self, name: str) -> Tensor:
        """The tensor, as a view of the mapped file; copy it before the checkpoint is closed."""
        path = self._paths[name]
        if path not in self._open:
            self._open[path] = safe_open(str(path), framework="pt")
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._open.clear()


def _single_file(folder: Path) -> dict[str, set[str] | None]:
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if "model.safetensors" in names:
        return {"model.safetensors": None}
    if len(names) == 1:
        return {names[0]: None}
    raise BadWeights(
        folder,
        f"no model.safetensors and no {INDEX_NAME} ({short_list(names)})" if names else "no *.safetensors file",
        "Expected one file, or shards with their index. Pickled weights are refused: they can run code.",
    )


def _read_index(path: Path) -> dict[str, set[str] | None]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        files: dict[str, set[str] | None] = {}
        for name, file_name in weight_map.items():
            files.setdefault(str(file_name), set()).add(name)  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadWeights(path, f"no readable index ({error!r})", "Expected an object `weight_map`.") from error
    if outside := sorted(name for name in files if Path(name).name != name or not name.endswith(".safetensors")):
        raise BadWeights(path, f"shards that are no file of this folder ({short_list(outside)})", "Download it again.")
    if missing := sorted(name for name in files if not (path.parent / name).is_file()):
        raise BadWeights(path, f"shards that it names are missing ({short_list(missing)})", "Download them, too.")
    return files
