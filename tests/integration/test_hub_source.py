"""Models from folders, and from the hub through the real hub client against a small hub on the loopback."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from engines.models.source import ModelSourceError, resolve_model, weights_digest

ROOT = Path(__file__).resolve().parents[2]
TINY_CHAT = ROOT / "models" / "tiny-chat"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = "/someone/tiny-chat/resolve/"
SERVED = {path.name: path.read_bytes() for path in TINY_CHAT.iterdir() if path.is_file()}
SERVED["pytorch_model.bin"] = b"\x80\x02never fetched"


class Hub(ThreadingHTTPServer):
    """Serves `someone/tiny-chat` in the way that huggingface_hub asks for it; remembers the paths that were fetched."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith(PREFIX):
            revision, _, name = path.removeprefix(PREFIX).partition("/")
            if revision in ("main", COMMIT) and name in SERVED:
                return self._send_file(name)
        if path in ("/api/models/someone/tiny-chat", "/api/models/someone/tiny-chat/revision/main"):
            siblings = [{"rfilename": name} for name in SERVED]
            return self._send_json(200, {"id": "someone/tiny-chat", "sha": COMMIT, "siblings": siblings})
        if path.startswith("/api/models/someone/tiny-chat/tree/"):
            return self._send_json(
                200, [{"type": "file", "path": k, "size": len(v), "oid": _oid(v)} for k, v in SERVED.items()]
            )
        code = "RevisionNotFound" if path.startswith("/api/models/someone/tiny-chat/") else "RepoNotFound"
        return self._send_json(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def _send_file(self, name: str) -> None:
        content = SERVED[name]
        start = 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        if self.command == "GET":
            self.server.fetched.append(name)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:])

    def _send_json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(raw)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, name="hub", daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def hub_environment(endpoint: str, cache: Path, *, offline: bool = False) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy") and not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    env |= {"HF_HOME": str(cache / "home"), "HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_ETAG_TIMEOUT": "5"}
    return env


def resolve(model: str, *, endpoint: str, cache: Path, revision: str = "", offline: bool = False) -> tuple[str, str]:
    """`resolve_model` in a process of its own: the hub client reads its environment once, when it is imported.

    Returns: (folder, error message); one of them is empty.
    """
    code = (
        "import sys\nfrom pathlib import Path\nfrom engines.models.source import ModelSourceError, resolve_model\n"
        "try:\n    print('FOLDER', resolve_model(sys.argv[1], sys.argv[2], Path(sys.argv[3])))\n"
        "except ModelSourceError as error:\n    print('ERROR', error.retryable, error)\n"
    )
    env = hub_environment(endpoint, cache, offline=offline)
    done = subprocess.run(
        [sys.executable, "-c", code, model, revision, str(cache)],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    kind, _, rest = lines[-1].partition(" ")
    return (rest, "") if kind == "FOLDER" else ("", "\n".join(lines))


def test_hub_id_becomes_a_folder_with_what_serving_reads_and_no_pickles(hub: Hub, tmp_path: Path) -> None:
    folder, error = resolve("someone/tiny-chat", endpoint=hub.url, cache=tmp_path)

    assert not error
    assert (Path(folder) / "model.safetensors").read_bytes() == SERVED["model.safetensors"]
    assert (Path(folder) / "tokenizer.json").read_bytes() == SERVED["tokenizer.json"]
    assert "pytorch_model.bin" not in hub.fetched
    assert not [name for name in hub.fetched if name.endswith(".py")]


def test_estimating_kv_of_a_hub_id_fetches_its_config_only(hub: Hub, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "celeriac", "kv", "estimate", "--model", "someone/tiny-chat", "--json"]
    done = subprocess.run(
        command, cwd=ROOT, env=hub_environment(hub.url, tmp_path),
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip

    assert json.loads(done.stdout)["kv_bytes_per_token"] == 1536
    assert set(hub.fetched) == {"config.json"}


def test_downloaded_model_is_found_again_when_the_hub_is_gone(hub: Hub, tmp_path: Path) -> None:
    first, _ = resolve("someone/tiny-chat", endpoint=hub.url, cache=tmp_path)
    num_fetched = len(hub.fetched)

    again, error = resolve("someone/tiny-chat", endpoint=hub.url, cache=tmp_path, offline=True)

    assert (again, error) == (first, "")
    assert len(hub.fetched) == num_fetched


def test_unknown_repository_and_unknown_revision_are_named(hub: Hub, tmp_path: Path) -> None:
    _, no_repository = resolve("someone/else", endpoint=hub.url, cache=tmp_path)
    _, no_revision = resolve("someone/tiny-chat", endpoint=hub.url, cache=tmp_path, revision="v9")

    assert "has no such repository" in no_repository
    assert "no revision 'v9'" in no_revision


def test_offline_without_a_copy_says_what_was_tried(tmp_path: Path) -> None:
    _, error = resolve("someone/tiny-chat", endpoint="http://127.0.0.1:9", cache=tmp_path)

    assert error.startswith("ERROR True")
    assert "no such folder here" in error
    assert "http://127.0.0.1:9 could not be reached" in error
    assert str(tmp_path) in error


# ---------------------------------------------------------------- folders
def make_folder(folder: Path, **files: bytes) -> Path:
    """`model_safetensors=b".."` becomes the file model.safetensors."""
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_bytes(content)
    return folder


def test_bundled_model_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert resolve_model("models/tiny-chat") == TINY_CHAT


def test_path_that_does_not_exist_names_the_places_looked_at() -> None:
    with pytest.raises(ModelSourceError, match=r"no such folder \(looked at not/here"):
        resolve_model("./not/here")


def test_file_instead_of_a_folder_is_refused() -> None:
    with pytest.raises(ModelSourceError, match="is a file"):
        resolve_model(str(TINY_CHAT / "config.json"))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({"notes_txt": b"x"}, r"has no config.json \(it has: notes.txt\)"),
        ({"config_json": b"{}"}, r"has no \*.safetensors file"),
        ({"config_json": b"{}", "pytorch_model_bin": b"\x80\x02"}, r"only pickled weights \(pytorch_model.bin\)"),
        ({"config_json": b"{}", "model_gguf": b"GGUF"}, "GGUF weights"),
        ({"config_json": b"{}", "model_safetensors": b""}, "an empty file"),
        ({"config_json": b"{}", "model_safetensors": b"version https://git-lfs.github.com"}, "a Git LFS pointer"),
        ({"config_json": b"{}", "model_safetensors": b"<!DOCTYPE html>"}, "an HTML page"),
        ({"config_json": b"{}", "model_safetensors": b"\x80\x02}q\x00" + b"x" * 20}, "a pickle"),
        ({"config_json": b"{}", "model_safetensors": b"PK\x03\x04" + b"x" * 20}, "a pickle"),
    ],
)
def test_folder_without_usable_weights_is_refused_with_the_reason(
    tmp_path: Path, files: dict[str, bytes], problem: str
) -> None:
    with pytest.raises(ModelSourceError, match=problem) as caught:
        resolve_model(str(make_folder(tmp_path, **files)))

    assert not caught.value.retryable


def test_digest_changes_with_one_bit_of_the_weights(tmp_path: Path) -> None:
    content = b"\x08" + b"\x00" * 7 + b"{}      " + b"w" * 100
    folder = make_folder(tmp_path, config_json=b"{}", model_safetensors=content)
    before = weights_digest(folder)

    (folder / "model.safetensors").write_bytes(content[:-1] + b"v")

    assert weights_digest(folder) != before
