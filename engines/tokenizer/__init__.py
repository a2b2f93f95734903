"""Text to token ids and back, without torch and without transformers.

Owns the tokenizer files of a model folder: encoding, decoding, the chat template (sandboxed), and the incremental text
of an output stream with its stop strings. The gateway and the worker's output thread use it, so it imports no
framework. It must not know requests, Redis, HTTP or devices.
"""

from engines.tokenizer.errors import BadTokenizer, ChatTemplateError, TokenizerError, UnknownTokenId
from engines.tokenizer.text_stream import TextStream
from engines.tokenizer.tokenizer import Tokenizer

__all__ = ["BadTokenizer", "ChatTemplateError", "TextStream", "Tokenizer", "TokenizerError", "UnknownTokenId"]
