"""How long a model's context is, from config.json alone: the gateway, the preflight and the engine have to agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from engines.errors import BadModelConfig

# Names that families of transformers use for it, the usual one first.
_NAMES: Final = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


def context_length(folder: Path) -> int:
    """Tokens of the longest sequence that the model was made for.

    `longrope` changes the angles of a whole batch once any of its sequences is long, so it counts as long as it was
    before it was stretched: its tokens would otherwise depend on who shares the step.

    Raises:
        BadModelConfig: no field says it.
    """
    path = folder / "config.json"
    try:
        fields: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadModelConfig(path, field="(file)", found=str(error), rule="a readable JSON file") from error
    if not isinstance(fields, dict):
        raise BadModelConfig(path, field="(file)", found=type(fields).__name__, rule="a JSON object")
    if isinstance(fields.get("text_config"), dict):
        fields = {**fields, **fields["text_config"]}
    found = next((fields[name] for name in _NAMES if fields.get(name) is not None), None)
    if type(found) is not int or found <= 0:
        raise BadModelConfig(path, field=_NAMES[0], found=found, rule="a whole number > 0")
    return _before_longrope(fields, found)


def _before_longrope(fields: dict[str, Any], length: int) -> int:
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) not in ("longrope", "su"):
        return length
    original = fields.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    return min(length, original) if type(original) is int and original > 0 else length
