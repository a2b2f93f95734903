"""The bytes that each token adds to a text, for the two decoders that language models use.

    ByteLevel                                     each character of a piece stands for one byte (GPT-2, Llama 3, Qwen)
    Sequence[Replace, ByteFallback, Fuse, Strip]  pieces are text, `<0xE2>` is a byte (Llama 2, Mistral, Gemma)

A text is the UTF-8 decoding of the joined bytes, so streams need no window over earlier tokens and cost O(1) per token.
"""

from __future__ import annotations

import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class UnsupportedDecoder(ValueError):
    """The tokenizer decodes in a way that is not a joining of bytes."""


class TokenBytes:
    """Bytes of a piece of the vocabulary. Immutable.

    Attributes:
        strip_left: spaces taken off the beginning of a decoded text (Llama 2 puts one there).
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        """Read the `decoder` entry of a tokenizer.json.

        Raises:
            UnsupportedDecoder: it is none of the two kinds above.
        """
        self.strip_left = 0
        self._is_byte_level = False
        self._has_byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        steps = (decoder or {}).get("decoders", [decoder]) if decoder else []
        for step in steps:
            self._add_step(step)

    def bytes_of(self, piece: str) -> bytes:
        """Bytes that the vocabulary entry `piece` adds to the text."""
        if self._is_byte_level:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in piece)
            except KeyError:  # an added token with a character outside of the byte alphabet stands for itself
                return piece.encode()
        if self._has_byte_fallback and (match := _BYTE_TOKEN.match(piece)):
            return bytes([int(match[1], 16)])
        for old, new in self._replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    def _add_step(self, step: dict[str, Any]) -> None:
        kind = step.get("type")
        if kind == "ByteLevel":
            self._is_byte_level = True
        elif kind == "ByteFallback":
            self._has_byte_fallback = True
        elif kind == "Replace" and "String" in step.get("pattern", {}):
            self._replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            self._replacements.append((step.get("replacement", "▁"), " "))
            self.strip_left = 0 if step.get("prepend_scheme", "always") == "never" else 1
        elif kind == "Strip" and step.get("content") == " " and not step.get("stop"):
            self.strip_left = int(step.get("start", 0))
        elif kind != "Fuse":
            raise UnsupportedDecoder(f"decoder step {kind!r}")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable Latin-1 is itself, the rest follows from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + k): byte for k, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_alphabet()
