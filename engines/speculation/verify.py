"""Which of the tokens sampled behind a draft are the sequence's. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def num_kept_tokens(draft: Sequence[int], sampled: Sequence[int], is_usable: Sequence[bool]) -> int:
    """How many of `sampled` plain decoding would have sampled, too: those whose guesses before them were all right.

    Args:
        sampled: one token more than the draft; `sampled[i]` was chosen behind `draft[:i]`.
        is_usable: of each of `sampled`, whether there was anything to choose from. One that had nothing is sampled
            again by a step that begins there, which says what is wrong with it.
    """
    num_kept = 1
    for guess, token_id, is_next_usable in zip(draft, sampled, is_usable[1:], strict=False):
        if guess != token_id or not is_next_usable:
            break
        num_kept += 1
    return num_kept
