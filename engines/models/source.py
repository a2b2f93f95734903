"""From the name of a model to a folder with its files: a local folder, or a repository of the Hugging Face hub.

    resolve_model("models/tiny-chat")                      a folder here, or one delivered beside this package
    resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct")   the hub (HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN are honoured)

Only files that serving reads are downloaded; pickled weights never are. No torch here.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import huggingface_hub
import xxhash
from huggingface_hub import constants, errors

logger = logging.getLogger(__name__)

DOWNLOAD_PATTERNS: Final = ("*.safetensors", "*.json", "tokenizer*", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(?:/[A-Za-z0-9][\w.-]{0,95})?\Z")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SOURCE_ROOT = Path(__file__).resolve().parents[2]
_CONVERT_HINT = (
    "Pickled weights can run code when they are loaded and are refused. Convert them once, on a machine you trust: "
    "`AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)` of transformers."
)
_READ_BYTES = 16 << 20


class ModelSourceError(Exception):
    """The model cannot be had. The message says what was looked for and what to do.

    Attributes:
        model: the name as it was given.
        retryable: the hub did not answer; the same call may succeed later.
    """

    def __init__(self, model: str, problem: str, hint: str, *, retryable: bool = False) -> None:
        super().__init__(f"model {model!r}: {problem}. {hint}")
        self.model = model
        self.problem = problem
        self.hint = hint
        self.retryable = retryable


def resolve_model(path_or_id: str, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """A folder with config.json, the tokenizer and at least one safetensors file. Blocks while it downloads.

    Args:
        revision: branch, tag or commit on the hub; empty or None is the default branch. Ignored for a folder.
        cache_dir: where downloads are kept; None is the hub client's own cache.

    Raises:
        ModelSourceError: not found, not usable, or the hub cannot be reached.
    """
    folder = _local_folder(path_or_id)
    if folder is None:
        folder = _download(path_or_id, revision or None, cache_dir)
    check_folder(path_or_id, folder)
    return folder


def download_config(model: str, revision: str | None = None) -> Path:
    """config.json of a folder or of a hub repository, and nothing else of it. Blocks while it downloads.

    Raises:
        ModelSourceError: not found, or the hub cannot be reached.
    """
    folder = _local_folder(model)
    if folder is not None:
        return folder / "config.json"
    with _hub_errors(model, revision, None):
        try:
            return Path(huggingface_hub.hf_hub_download(model, "config.json", revision=revision))
        except errors.RemoteEntryNotFoundError as error:
            raise ModelSourceError(
                model, f"{constants.ENDPOINT} has no config.json of it", "Name a repository with a transformers model."
            ) from error


def check_folder(model: str, folder: Path) -> None:
    """Look at names and first bytes only: enough to tell weights from what often lies in their place.

    Raises:
        ModelSourceError: no config.json, no safetensors file, or one that is something else under that name.
    """
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" not in names:
        raise ModelSourceError(
            model,
            f"{folder} has no config.json (it has: {_short_list(names)})",
            "Expected a Hugging Face model folder.",
        )
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        pickled = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
        gguf = [name for name in names if name.endswith(".gguf")]
        if pickled:
            raise ModelSourceError(model, f"{folder} has only pickled weights ({_short_list(pickled)})", _CONVERT_HINT)
        if gguf:
            raise ModelSourceError(model, f"{folder} has GGUF weights", "Use the repository with safetensors files.")
        raise ModelSourceError(
            model, f"{folder} has no *.safetensors file (it has: {_short_list(names)})", "Download the weights, too."
        )
    for name in weights:
        _check_weights_file(model, folder / name)


def weights_digest(folder: Path) -> str:
    """Hex xxh3 over config.json and all weights: equal only for the same model. Reads every byte once."""
    digest = xxhash.xxh3_128()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    return str(digest.hexdigest())


def _local_folder(model: str) -> Path | None:
    """The folder that `model` names; None when it can only be a hub id."""
    candidates = dict.fromkeys([Path(model).expanduser(), _SOURCE_ROOT / model])
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.resolve()
        if candidate.exists():
            raise ModelSourceError(model, f"{candidate} is a file", "Expected the folder that holds config.json.")
    if not _HUB_ID.match(model) or ".." in model:
        looked_at = ", ".join(str(candidate) for candidate in candidates)
        raise ModelSourceError(
            model, f"there is no such folder (looked at {looked_at})", "Give a folder, or a hub id like `owner/name`."
        )
    return None


def _download(model: str, revision: str | None, cache_dir: Path | None) -> Path:
    with _hub_errors(model, revision, cache_dir):
        _announce(model, revision, cache_dir)
        return Path(
            huggingface_hub.snapshot_download(
                model, revision=revision, cache_dir=cache_dir, allow_patterns=list(DOWNLOAD_PATTERNS)
            )
        )


@contextlib.contextmanager
def _hub_errors(model: str, revision: str | None, cache_dir: Path | None) -> Iterator[None]:
    """Turn what the hub client raises into a ModelSourceError that says what to do."""
    endpoint = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelSourceError(
            model, f"{endpoint} gives it only to people who accepted its licence", "Accept it there and set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelSourceError(
            model, f"{endpoint} has no revision {revision!r} of it", "Name a branch, tag or commit that exists."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelSourceError(
            model,
            f"there is no such folder here, and {endpoint} has no such repository (or does not show it)",
            "Check the spelling; for a private one set HF_TOKEN.",
        ) from error
    except errors.HFValidationError as error:
        raise ModelSourceError(
            model, "neither a folder here nor a hub id", "Give a folder, or a hub id like `owner/name`."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, errors.HfHubHTTPError, OSError) as error:
        raise ModelSourceError(
            model,
            f"there is no such folder here, {endpoint} could not be reached ({_first_line(error)}), and the cache "
            f"{cache_dir or constants.HF_HUB_CACHE} does not hold it completely",
            "Connect to the network, set HF_ENDPOINT to a mirror, or give the path of a folder.",
            retryable=True,
        ) from error


def _announce(model: str, revision: str | None, cache_dir: Path | None) -> None:
    """Say how much will be downloaded, before it is."""
    try:
        files = huggingface_hub.snapshot_download(
            model, revision=revision, cache_dir=cache_dir, allow_patterns=list(DOWNLOAD_PATTERNS), dry_run=True
        )
    except errors.DryRunError:  # offline: the real call below finds the cached copy, or says why not
        return
    missing = [file for file in files if file.will_download]
    if missing:
        size_mb = sum(file.file_size or 0 for file in missing) / 1e6
        logger.warning("downloading %s from %s: %d files, %.1f MB", model, constants.ENDPOINT, len(missing), size_mb)


def _check_weights_file(model: str, path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ModelSourceError(
            model, f"{path} cannot be read ({error})", "Check the link and its permissions."
        ) from error
    what = _mistaken_for_weights(head)
    if what:
        hint = _CONVERT_HINT if "pickle" in what else "Download the file again (a Git clone needs `git lfs pull`)."
        raise ModelSourceError(model, f"{path.name}: this is {what}, not the weights", hint)


def _mistaken_for_weights(head: bytes) -> str:
    """What a file that begins with `head` is, when it is certainly no safetensors file; else ""."""
    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page"
    # A pickle starts with PROTO and a version, torch's newer format is a zip. A safetensors file starts with the
    # length of its header and a brace, so the ninth byte tells them apart.
    if head[:4] == b"PK\x03\x04" or (
        head[0] == 0x80 and head[1:2] in (b"\x02", b"\x03", b"\x04") and head[8:9] != b"{"
    ):
        return "a pickle (under the name of a safetensors file)"
    return ""


def _short_list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
