"""A YAML file as a flat list of scalars with their lines. Values stay text: the schema says what they are.

Refused, each with its line: tags, anchors and aliases (a page of them can grow to gigabytes), more than one document,
lists, the same key twice, tabs, files over 1 MiB or not UTF-8. So neither code nor surprise comes out of a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from configs.errors import ConfigError, ConfigFault

MAX_FILE_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 8


@dataclass(frozen=True)
class Scalar:
    """One leaf. `text` is None for an empty value; `path` is dotted."""

    path: str
    text: str | None
    line: int


@dataclass(frozen=True)
class YamlFile:
    """`is_empty`: nothing but comments, so every value is a default."""

    path: Path
    scalars: tuple[Scalar, ...]
    faults: tuple[ConfigFault, ...]
    is_empty: bool = False


def read_yaml(path: Path) -> YamlFile:
    """Scalars and faults of one file. Faults that leave the rest readable are returned, the others raised.

    Raises:
        ConfigError: the file cannot be read or parsed.
    """
    text = _read_text(path)
    try:
        faults = _forbidden(path, text)
        if faults:
            raise ConfigError(faults)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_parse_fault(path, error)]) from None
    except yaml.YAMLError as error:  # a control character: no line is told
        raise ConfigError([ConfigFault(str(path), "", f"not YAML ({error})".replace("\n", " "))]) from None
    if root is None:
        return YamlFile(path, (), (), is_empty=True)
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError([ConfigFault(f"{path}:{_line(root)}", "", "not a mapping", "`section:` and its settings")])
    scalars: list[Scalar] = []
    found: list[ConfigFault] = []
    _walk(path, root, "", scalars, found)
    return YamlFile(path, tuple(scalars), tuple(found))


def _read_text(path: Path) -> str:
    def refuse(what: str, expected: str = "a YAML file") -> ConfigError:
        return ConfigError([ConfigFault(str(path), "", what, expected)])

    try:
        if not path.exists():
            raise refuse("there is no such file")
        if not path.is_file():
            raise refuse("is a folder or a device, not a file")
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise refuse(f"cannot be read ({error.strerror})") from None
    if len(raw) > MAX_FILE_BYTES:
        raise refuse("the file is too long", f"at most {MAX_FILE_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise refuse(f"is not UTF-8 (byte {error.start})") from None


def _forbidden(path: Path, text: str) -> list[ConfigFault]:
    """Constructs that we never build anything of. Looks at events only, so an alias is never expanded."""
    faults, num_documents, depth = [], 0, 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{path}:{event.start_mark.line + 1 if event.start_mark else 1}"
        if isinstance(event, yaml.DocumentStartEvent):
            num_documents += 1
            if num_documents == 2:
                faults.append(ConfigFault(where, "", "a second document begins", "one document per file"))
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            faults.append(ConfigFault(where, "", "anchors and aliases are not read", "the value itself"))
        elif tag := getattr(event, "tag", None):
            faults.append(ConfigFault(where, "", f"the tag {tag} is not read", "a plain value"))
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                faults.append(ConfigFault(where, "", "nested too deep", "`section:` and its settings"))
                return faults
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
    return faults


def _walk(path: Path, node: yaml.MappingNode, prefix: str, scalars: list[Scalar], faults: list[ConfigFault]) -> None:
    lines: dict[str, int] = {}
    for key_node, value in node.value:
        line = _line(key_node)
        if not isinstance(key_node, yaml.ScalarNode):
            faults.append(ConfigFault(f"{path}:{line}", prefix, "a key that is not a word", "a setting's name"))
            continue
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        if key in lines:
            faults.append(
                ConfigFault(f"{path}:{line}", key, f"given twice, first in line {lines[key]}", "one of the two")
            )
            continue
        lines[key] = line
        if isinstance(value, yaml.MappingNode):
            _walk(path, value, key, scalars, faults)
        elif isinstance(value, yaml.ScalarNode):
            is_empty = value.tag == "tag:yaml.org,2002:null" and not value.style
            scalars.append(Scalar(key, None if is_empty else str(value.value), line))
        else:
            faults.append(ConfigFault(f"{path}:{line}", key, "a list", "one value"))


def _parse_fault(path: Path, error: yaml.MarkedYAMLError) -> ConfigFault:
    mark = error.problem_mark or error.context_mark
    where = f"{path}:{mark.line + 1}" if mark else str(path)
    problem = " ".join((error.problem or "not YAML").split())
    hint = "indent with spaces" if "\\t" in problem else ""
    return ConfigFault(where, "", problem, "YAML", hint)


def _line(node: yaml.Node) -> int:
    line: int = node.start_mark.line + 1
    return line
