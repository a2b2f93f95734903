"""Reads and checks the tokenizer files of a model folder.

tokenizer.json            required: the whole tokenizer
tokenizer_config.json     names of special tokens, the chat template
chat_template.jinja       the chat template, where it has a file of its own (wins)
generation_config.json    end tokens (wins), sampling defaults
config.json               end tokens, number of embedding rows
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from engines.tokenizer.errors import BadTokenizer

MAX_TOKENIZER_BYTES: Final = 128 << 20
MAX_CONFIG_BYTES: Final = 32 << 20  # templates are inside; `ChatTemplate` has a limit of its own
MAX_ADDED_TOKEN_CHARS: Final = 1 << 20

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "top_k": (0, 1 << 31),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 1e6),
}


@dataclass(frozen=True)
class TokenizerFiles:
    """What the folder says, checked one file at a time; `Tokenizer` checks them against the vocabulary.

    Attributes:
        special_names: `bos_token` and so on, as templates see them.
        templates: name to Jinja source; a model with one template calls it `default`.
        eos: end tokens as ids, or the text of one where only tokenizer_config.json names it.
        num_embeddings: rows of the model's embedding, None when config.json does not say.
    """

    folder: Path
    tokenizer_json: str
    special_names: dict[str, str]
    templates: dict[str, str]
    eos: tuple[int | str, ...]
    num_embeddings: int | None
    digest: str = field(repr=False)

    @staticmethod
    def read(folder: Path) -> TokenizerFiles:
        """Read all files.

        Raises:
            BadTokenizer: a file is missing, too large, or not what it should be.
        """
        tokenizer_json = _read_tokenizer_json(folder / "tokenizer.json")
        config = _read_json(folder / "config.json")
        tokenizer_config = _read_json(folder / "tokenizer_config.json")
        generation = _read_json(folder / "generation_config.json")
        _check_generation(folder / "generation_config.json", generation)
        special_names = _special_names(tokenizer_config)
        templates = _templates(folder, tokenizer_config)
        eos = _eos(folder, generation, config, special_names)
        digest = hashlib.sha256(tokenizer_json.encode())
        digest.update(json.dumps([special_names, templates, eos], sort_keys=True).encode())
        return TokenizerFiles(
            folder, tokenizer_json, special_names, templates, eos, _num_embeddings(config), digest.hexdigest()
        )


def _read_tokenizer_json(path: Path) -> str:
    if not path.is_file():
        slow = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (path.parent / name).exists()]
        hint = (
            f"Only {', '.join(slow)} is there (a slow tokenizer): convert it with "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` of transformers."
            if slow
            else "Expected the file that `save_pretrained` writes."
        )
        raise BadTokenizer(path, "the tokenizer is missing", hint)
    text = _read_text(path, MAX_TOKENIZER_BYTES)
    content = _parse(path, text)
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(a, dict) and isinstance(a.get("content"), str) for a in added):
        raise BadTokenizer(path, "`added_tokens` is not a list of tokens", "Download the file again.")
    num_chars = sum(len(entry["content"]) for entry in added)
    if num_chars > MAX_ADDED_TOKEN_CHARS:
        raise BadTokenizer(
            path,
            f"{len(added)} added tokens have {num_chars} characters",
            f"At most {MAX_ADDED_TOKEN_CHARS} are accepted; this is not the tokenizer of a language model.",
        )
    return text


def _read_json(path: Path) -> dict[str, Any]:
    return _parse(path, _read_text(path, MAX_CONFIG_BYTES)) if path.is_file() else {}


def _read_text(path: Path, max_bytes: int) -> str:
    num_bytes = path.stat().st_size
    if num_bytes > max_bytes:
        raise BadTokenizer(path, f"the file has {num_bytes} bytes", f"At most {max_bytes} are accepted.")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadTokenizer(path, f"the file cannot be read as UTF-8 ({error})", "Download it again.") from error
    if text.startswith("version https://git-lfs"):
        raise BadTokenizer(path, "this is a Git LFS pointer, not the file", "Fetch it with `git lfs pull`.")
    return text


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "an HTML page" if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")) else "not valid JSON"
        raise BadTokenizer(path, f"{what} ({error})", "Download the file again.") from error
    if not isinstance(content, dict):
        raise BadTokenizer(path, "not a JSON object", "Download the file again.")
    return content


def _special_names(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = tokenizer_config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            names[name] = text
    return names


def _templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return {"default": _read_text(path, MAX_CONFIG_BYTES)}
    template = tokenizer_config.get("chat_template")
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, dict):
        return {str(name): str(source) for name, source in template.items()}
    if isinstance(template, list):
        return {str(entry["name"]): str(entry["template"]) for entry in template if {"name", "template"} <= set(entry)}
    return {}


def _eos(
    folder: Path, generation: dict[str, Any], config: dict[str, Any], special_names: dict[str, str]
) -> tuple[int | str, ...]:
    """generation_config.json, else config.json, else tokenizer_config.json: the order of `transformers.generate`."""
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        value = content.get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not ids or not all(type(token_id) is int for token_id in ids):
            raise BadTokenizer(folder / name, f"`eos_token_id` is {value!r}", "Expected a token id, or a list of them.")
        return tuple(dict.fromkeys(ids))
    return (special_names["eos_token"],) if "eos_token" in special_names else ()


def _check_generation(path: Path, generation: dict[str, Any]) -> None:
    for name, (low, high) in _RANGES.items():
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise BadTokenizer(path, f"`{name}` is {value!r}", f"Expected a number in [{low:g}, {high:g}].")


def _num_embeddings(config: dict[str, Any]) -> int | None:
    value = config.get("vocab_size")
    return value if type(value) is int else None
