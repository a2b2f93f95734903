from __future__ import annotations

import re
from pathlib import Path

import pytest

import configs
from compose.reference import PAGES, ROOT
from configs.dump import to_yaml
from configs.fields import all_fields
from configs.unread import UNREAD
from configs.values import format_value, parse_value

READERS = ("kvstore", "engines", "tasks", "webapp", "compose")


def test_every_setting_is_described_and_its_default_is_valid() -> None:
    for field in all_fields().values():
        assert field.description, field.path
        assert parse_value(field, format_value(field, field.default)) == field.default


def test_every_setting_is_read_by_some_code_or_listed_as_unread() -> None:
    sources = "\n".join(path.read_text() for package in READERS for path in sorted((ROOT / package).rglob("*.py")))
    ignored = []
    for path in all_fields():
        section, _, name = path.rpartition(".")
        owner = rf"\b({section}|role|getattr\(settings, role\))" if section in ("prefill", "decode") else ""
        if path not in UNREAD and not re.search(rf"{owner}\.{name}\b", sources):
            ignored.append(path)
    assert ignored == [], "no code reads these: list them in configs/unread.py, or read them"


def test_settings_read_back_from_what_was_written(tmp_path: Path) -> None:
    env = {
        "HOME": str(tmp_path),
        "CELERIAC_KV__MEMORY_BYTES": "123456789B",
        "CELERIAC_MODEL__PATH": 'odd "name": # \\ ü',
        "CELERIAC_WORKER__DRAIN_TIMEOUT_S": "0.125",
        "CELERIAC_TRANSFER__CHECKSUM": "false",
    }
    settings = configs.load(env=env)
    file = tmp_path / "cluster.yaml"
    file.write_text(to_yaml(settings))
    assert configs.load(file, env={"HOME": "/elsewhere"}) == settings


def test_passwords_are_not_shown() -> None:
    env = {
        "HOME": "/h",
        "CELERIAC_STATE__BROKER_URL": "redis://user:hunter2@db:6379/0",
        "CELERIAC_FLOWER__BASIC_AUTH": "me:hunter2",
    }
    shown = to_yaml(configs.load(env=env), hide_secrets=True)
    assert "hunter2" not in shown
    assert "redis://user:********@db:6379/0" in shown


@pytest.mark.parametrize("page", PAGES)
def test_reference_page_is_current(page: str) -> None:
    assert (ROOT / page).read_text() == PAGES[page](), "run `make docs`"
