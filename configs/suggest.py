"""Did you mean ...? One rule for keys, choices, flags and commands."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint, or "" if nothing is near.

    >>> did_you_mean("decode.max_batchsize", ["decode.max_batch_size"])
    'did you mean `decode.max_batch_size`?'
    """
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if not near and "." in word:  # the right name in the wrong section
        near = [name for name in names if name.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    return f"did you mean `{near[0]}`?" if near else ""
