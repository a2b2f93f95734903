from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.yaml_source import MAX_FILE_BYTES, read_yaml


def refused(content: bytes | str, tmp_path: Path) -> str:
    file = tmp_path / "a.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        read_yaml(file)
    return str(caught.value).replace(str(file), "a.yaml")


def test_same_key_twice_names_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("kv:\n  block_size: 16\n  block_size: 32\n")
    (fault,) = read_yaml(file).faults
    assert str(fault) == f"{file}:3: kv.block_size: given twice, first in line 2; expected one of the two"


def test_same_section_twice_names_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("kv:\n  block_size: 16\nkv:\n  num_blocks: 1\n")
    (fault,) = read_yaml(file).faults
    assert "given twice, first in line 1" in str(fault)


def test_tabs_are_refused_with_their_line(tmp_path: Path) -> None:
    message = refused("kv:\n\tblock_size: 16\n", tmp_path)
    assert message.startswith("a.yaml:2:")
    assert "\\t" in message


def test_tags_never_build_anything(tmp_path: Path) -> None:
    message = refused("kv: !!python/object/apply:os.system [id]\n", tmp_path)
    assert "a.yaml:1: the tag tag:yaml.org,2002:python/object/apply:os.system is not read" in message


def test_anchor_bombs_are_refused_before_they_grow(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    assert "anchors and aliases are not read" in refused(bomb, tmp_path)


def test_a_second_document_is_refused(tmp_path: Path) -> None:
    assert "a second document begins" in refused("kv: {}\n---\nkv: {}\n", tmp_path)


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    assert "nested too deep" in refused("a: " + "[" * 5000, tmp_path)


def test_files_that_cannot_be_read_are_named_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        read_yaml(tmp_path)
    assert "is not UTF-8 (byte 4)" in refused(b"kv: \xff\n", tmp_path)
    assert "too long" in refused(b"#" * (MAX_FILE_BYTES + 1), tmp_path)
    assert "not YAML" in refused(b"kv: \x00\n", tmp_path)


def test_lists_and_bare_values_are_refused(tmp_path: Path) -> None:
    assert "not a mapping" in refused("- a\n", tmp_path)
    file = tmp_path / "b.yaml"
    file.write_text("kv:\n  block_size: [1, 2]\n")
    assert "a list" in str(read_yaml(file).faults[0])


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfkv:\n  block_size: 16\n")
    assert read_yaml(file).scalars[0].path == "kv.block_size"
