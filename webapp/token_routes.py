"""Models, and tokens without generation: /v1/models, /tokenize, /detokenize."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response

from webapp.app import gateway_of, json_answer, no_options
from webapp.errors import ApiError, InvalidRequest
from webapp.generate import read_json
from webapp.openai.chat_body import chat_surface, render_chat
from webapp.openai.completion_body import check_bytes, check_token_ids
from webapp.openai.fields import Boolean, Checker, Text, wrong_type
from webapp.openai.messages import check_messages
from webapp.openai.served_model import ServedModel
from webapp.openai.surface import NEUTRAL_CHAT, Surface

routes = Blueprint("tokens", __name__)


@routes.get("/v1/models", **no_options())
def models() -> Response:
    """The models served here."""
    return json_answer({"object": "list", "data": [gateway_of().model.card()]})


@routes.get("/v1/models/<path:name>", **no_options())
def model(name: str) -> Response:
    """One model; its name may hold slashes."""
    served = gateway_of().model
    if name != served.name:
        message = f"model {name[:200]!r} is not served here; GET /v1/models lists what is"
        raise ApiError(404, "model_not_found", message, param="model")
    return json_answer(served.card())


@routes.post("/tokenize", **no_options())
def tokenize() -> Response:
    """Token ids of a prompt or of messages."""
    gateway = gateway_of()
    body, _ = read_json(gateway)
    served = gateway.model
    served.check_name(body.get("model"))
    if "messages" in body:
        ids, with_strings = _chat_ids(body, served)
    else:
        ids, with_strings = _prompt_ids(body, served)
    strings = [served.tokenizer.token_text(i) for i in ids] if with_strings else None
    return json_answer({"count": len(ids), "max_model_len": served.max_model_len, "tokens": ids, "token_strs": strings})


@routes.post("/detokenize", **no_options())
def detokenize() -> Response:
    """Text of token ids, special tokens included."""
    gateway = gateway_of()
    body, _ = read_json(gateway)
    served = gateway.model
    served.check_name(body.get("model"))
    surface = Surface({"model": _as_is, "tokens": _as_is}, {}, required=("tokens",))
    tokens = surface.check(body).get("tokens", [])
    if not isinstance(tokens, list):
        raise wrong_type("tokens", "an array of token ids", tokens)
    ids = check_token_ids(tokens, "tokens", served.tokenizer.vocab_size)
    return json_answer({"prompt": served.tokenizer.decode(ids, skip_special_tokens=False)})


def _prompt_ids(body: dict[str, Any], served: ServedModel) -> tuple[list[int], bool]:
    fields: dict[str, Checker] = {
        "model": _as_is,
        "prompt": Text(),
        "add_special_tokens": Boolean(),
        "return_token_strs": Boolean(),
    }
    checked = Surface(fields, {}, required=("prompt",)).check(body)
    prompt = checked.get("prompt", "")
    check_bytes(prompt, "prompt", served)
    ids = served.tokenizer.encode(prompt, add_special_tokens=checked.get("add_special_tokens", True))
    return ids, checked.get("return_token_strs", False)


def _chat_ids(body: dict[str, Any], served: ServedModel) -> tuple[list[int], bool]:
    if "prompt" in body:
        raise InvalidRequest("conflict_fields", "prompt and messages must not both be given", param="prompt")
    fields: dict[str, Checker] = {"model": _as_is, "messages": check_messages, "return_token_strs": Boolean()}
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools", "tool_choice"):
        fields[name] = chat_surface(served.tokenizer.vocab_size).served[name]
    checked = Surface(fields, NEUTRAL_CHAT, required=("messages",)).check(body)
    return render_chat(checked, served), checked.get("return_token_strs", False)


def _as_is(value: Any, _path: str) -> Any:
    return value
