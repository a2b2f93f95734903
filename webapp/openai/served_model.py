"""What the gateway knows of the model it serves: its name, tokenizer, context and identity. No weights."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from configs.schema import ModelSettings
from engines.models.context import context_length
from engines.models.source import resolve_model
from engines.structured.checker import ConstraintChecker
from engines.tokenizer import Tokenizer
from kvstore.state.records import WorkerBeat
from webapp.errors import ApiError, InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]*(/[A-Za-z0-9][A-Za-z0-9._:@-]*)*")


@dataclass(frozen=True)
class ServedModel:
    """One model. `max_model_len` counts prompt and output tokens together; `constraints` checks structured outputs."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    identity: str
    longest_token_bytes: int
    constraints: ConstraintChecker
    created: int = field(default_factory=lambda: int(time.time()))
    workers: str = ""
    repeatability: str = "best-effort"

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: a digest of model, version and what its workers compute with, and a word.

        `exact`: the same request gets the same tokens in any batch and after a recovery. Else `best-effort`.
        """
        digest = hashlib.sha256(f"{self.identity}|{self.workers}".encode()).hexdigest()[:12]
        return f"fp_{digest}-{self.repeatability}"

    def as_served_by(self, beats: Sequence[WorkerBeat]) -> ServedModel:
        """The same with what its live workers say. Exact only if all of them are, and compute alike."""
        own = [beat for beat in beats if beat.model == self.name]
        words = sorted({f"{beat.dtype} {beat.compat} {beat.repeatability}" for beat in own})
        is_exact = len(words) == 1 and own[0].repeatability != "best-effort"
        return replace(self, workers="|".join(words), repeatability="exact" if is_exact else "best-effort")

    def card(self) -> dict[str, Any]:
        """The object of `/v1/models`."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "celeriac",
            "root": self.name,
            "parent": None,
            "max_model_len": self.max_model_len,
            "permission": [],
        }

    def check_name(self, name: Any) -> None:
        """Absent is the only model there is.

        Raises:
            ApiError: 400 for what cannot be a name, 404 `model_not_found`. The name is never used as a path.
        """
        if name is None or name == self.name:
            return
        if not isinstance(name, str):
            raise InvalidRequest("invalid_type", "model must be a string", param="model")
        if len(name) > 256 or not _NAME.fullmatch(name):
            message = "model must be a name of 1 to 256 letters, digits and any of . _ : @ - /"
            raise InvalidRequest("invalid_value", message, param="model")
        message = f"model {name!r} is not served here; GET /v1/models lists what is"
        raise ApiError(404, "model_not_found", message, param="model")

    def check_length(self, num_prompt_tokens: int, max_tokens: int | None, *, param: str) -> int:
        """The output tokens that a choice may have: what was asked, or the rest of the context.

        Raises:
            InvalidRequest: `context_length_exceeded`, with all three numbers.
        """
        rest = self.max_model_len - num_prompt_tokens
        if rest < 1 or (max_tokens or 0) > rest:
            asked = "" if max_tokens is None else f" and {max_tokens} output tokens are requested"
            message = (
                f"the prompt has {num_prompt_tokens} tokens{asked}, but the context of {self.name} holds "
                f"{self.max_model_len} in all; shorten the prompt or lower {param}"
            )
            raise InvalidRequest("context_length_exceeded", message)
        return rest if max_tokens is None else max_tokens


def load_served_model(settings: ModelSettings, *, version: str) -> ServedModel:
    """Reads the tokenizer and the context length of the configured model.

    Raises:
        OSError, ValueError: the folder or hub id cannot be read (see `engines.models.source`).
    """
    folder = resolve_model(settings.path, settings.revision)
    tokenizer = Tokenizer.from_folder(folder)
    identity = "|".join((tokenizer.digest, settings.dtype, _digest(folder / "config.json"), version))
    return ServedModel(
        name=settings.name,
        tokenizer=tokenizer,
        max_model_len=settings.max_model_len or context_length(folder),
        identity=identity,
        longest_token_bytes=max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)),
        constraints=ConstraintChecker(folder / "tokenizer.json", tokenizer.vocab_size, tokenizer.eos_token_ids),
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
