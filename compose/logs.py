"""`celeriac logs`: the files of a run folder, each line with the name of its process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from compose.errors import UsageProblem
from compose.run_folder import RunFolder
from configs.suggest import did_you_mean

Echo = Callable[[str], None]
FOLLOW_EVERY_S = 0.3


def print_logs(folder: RunFolder, name: str | None, num_lines: int, echo: Echo) -> list[str]:
    """Last lines of one log or of all. Returns the names.

    Raises:
        UsageProblem: there is no such log.
    """
    known = folder.log_names()
    if name is not None and name not in known:
        hint = did_you_mean(name, known)
        raise UsageProblem(
            f"No log {name!r} in {folder.path / 'logs'}. Expected one of {', '.join(known) or '(none)'}. {hint}"
        )
    names = [name] if name is not None else known
    for each in names:
        for line in folder.log_tail(each, num_lines=num_lines).splitlines():
            echo(_prefixed(each, line, names))
    return names


def follow_logs(folder: RunFolder, names: Sequence[str], echo: Echo) -> None:
    """What is written from now on, until Ctrl-C. A process that starts later is followed, too, if all are."""
    ends = {name: _size(folder, name) for name in names}
    follows_all = set(names) == set(folder.log_names())
    rest: dict[str, str] = {}
    while True:
        for name in folder.log_names() if follows_all else names:
            start, size = ends.get(name, 0), _size(folder, name)
            if size > start:
                with folder.log_path(name).open("rb") as file:
                    file.seek(start)
                    text = rest.pop(name, "") + file.read(size - start).decode(errors="replace")
                *lines, rest[name] = text.split("\n")
                for line in lines:
                    echo(_prefixed(name, line, names))
            ends[name] = size
        time.sleep(FOLLOW_EVERY_S)


def _size(folder: RunFolder, name: str) -> int:
    try:
        return folder.log_path(name).stat().st_size
    except OSError:
        return 0


def _prefixed(name: str, line: str, names: Sequence[str]) -> str:
    return line if len(names) == 1 else f"{name} | {line}"
