"""What can go wrong in `engines.tokenizer`, as one tree.

    TokenizerError(retryable)
    ├── BadTokenizer          the folder's files cannot be used: the model does not start
    ├── UnknownTokenId        an id outside the vocabulary
    └── ChatTemplateError     a conversation that the model's template refuses, or a broken template: HTTP 400

None is retryable: the same input fails again.
"""

from __future__ import annotations

from pathlib import Path


class TokenizerError(Exception):
    """Base of all errors of this package."""

    retryable: bool = False


class BadTokenizer(TokenizerError):
    """A file of the model folder cannot be used. The message names the file, the fault and the way out."""

    def __init__(self, path: Path, problem: str, hint: str) -> None:
        super().__init__(f"{path}: {problem}. {hint}")
        self.path = path
        self.problem = problem
        self.hint = hint


class UnknownTokenId(TokenizerError):
    """An id that the vocabulary does not have."""

    def __init__(self, token_id: int, vocab_size: int) -> None:
        super().__init__(f"token id {token_id} is not in the vocabulary. Token ids must be in 0..{vocab_size - 1}.")
        self.token_id = token_id
        self.vocab_size = vocab_size


class ChatTemplateError(TokenizerError):
    """The chat template did not render this conversation.

    Attributes:
        text: for `raise_exception(...)` the template's own words, else what went wrong.
        raised_by_template: True when the template itself refused the conversation.
    """

    def __init__(self, text: str, *, raised_by_template: bool = False) -> None:
        super().__init__(text)
        self.text = text
        self.raised_by_template = raised_by_template
