"""A seeded generator of synthetic English chat conversations, in pure Python.

Everything is written by the small grammars and templates of these modules; nothing is taken from any other text. The
same seed always gives the same conversations.

    python -m corpus --n 5 --skill recall      # look at some conversations
    python -m corpus --stats                   # how the skills are mixed

A conversation is a dict of `skill`, `messages` (each with `role`, `content` and perhaps `tool_calls`) and `tools` (a
list, or None). `render` gives its ChatML text, the same text as the chat template in tokenizer_config.json gives.
"""

from corpus.arithmetic import draw_sum
from corpus.chat_format import CHAT_TEMPLATE, render
from corpus.drawing import pick, user
from corpus.skills import SKILLS, make_one, stream
from corpus.words import SIMPLE_WORDS, UNICODE_WORDS

__all__ = [
    "CHAT_TEMPLATE",
    "SIMPLE_WORDS",
    "SKILLS",
    "UNICODE_WORDS",
    "draw_sum",
    "make_one",
    "pick",
    "render",
    "stream",
    "user",
]
