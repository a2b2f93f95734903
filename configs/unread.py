"""Settings that no code reads yet, or not with that value. Valid in a file, refused by name before anything starts.

Whoever makes the code read one removes its line here; a test finds settings that are neither read nor listed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from configs.errors import ConfigFault
from configs.fields import all_fields, value_at
from configs.schema import Settings

_any_but_default: Final = None

# path -> (values that nothing reads; None: any but the default, reason)
UNREAD: Final[Mapping[str, tuple[Callable[[Any], bool] | None, str]]] = {
    "decode.max_batch_size": (_any_but_default, "sequences join one by one, `decode.max_num_seqs` is the limit"),
}


def unread_faults(settings: Settings, origins: Mapping[str, str]) -> list[ConfigFault]:
    """Every setting that somebody gave a value nothing reads, or not beside another."""
    fields = all_fields()
    faults = []
    for path, (is_unread, reason) in UNREAD.items():
        value = value_at(settings, path)
        if is_unread(value) if is_unread is not None else value != fields[path].default:
            what = f"{value!r} would be ignored: {reason}"
            faults.append(ConfigFault(origins.get(path, "default"), path, what, f"{fields[path].default!r} for now"))
    for name in ("prefill", "decode"):
        role, path = getattr(settings, name), f"{name}.tensor_parallel_size"
        if role.device == "cuda" and role.tensor_parallel_size > 1:
            what = f"{role.tensor_parallel_size} ranks share one KV region in host memory, and {name}.device is cuda"
            faults.append(ConfigFault(origins.get(path, "default"), path, what, f"1, or {name}.device=cpu, for now"))
    return faults
