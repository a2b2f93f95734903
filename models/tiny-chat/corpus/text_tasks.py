"""Spelling, copying and sorting."""

from random import Random

from corpus.drawing import Turns, assistant, phrase, pick, user
from corpus.words import NAMES, SIMPLE_WORDS, words


def ask_letters(rng: Random) -> Turns:
    """Spelling, reversing, upper and lower case."""
    w, chance = pick(rng, SIMPLE_WORDS if rng.random() < 0.8 else [x.lower() for x in NAMES]), rng.random()
    if chance < 0.4:
        return [
            user(pick(rng, [f"Spell the word {w}.", f"Spell {w} letter by letter.", f"How do you spell {w}?"])),
            assistant("-".join(w)),
        ], None
    if chance < 0.6:
        w = pick(rng, [x for x in SIMPLE_WORDS if len(x) <= 5])
        return [
            user(pick(rng, [f"Reverse the word {w}.", f"Write {w} backwards."])),
            assistant("-".join(w[::-1])),
        ], None
    if chance < 0.7:
        return [
            user(pick(rng, [f"How many letters are in {w}?", f"How many letters does {w} have?"])),
            assistant(f"{'-'.join(w)}: {len(w)}"),
        ], None
    if chance < 0.78:
        return [user(f"What is the first letter of {w}?"), assistant(w[0])], None
    p = " ".join(pick(rng, SIMPLE_WORDS) for _ in range(rng.randint(1, 3)))
    if chance < 0.9:
        return [
            user(pick(rng, [f"Write in upper case: {p}", f"Make this upper case: {p}"])),
            assistant(p.upper()),
        ], None
    return [
        user(pick(rng, [f"Write in lower case: {p.upper()}", f"Make this lower case: {p.upper()}"])),
        assistant(p),
    ], None


def ask_copy(rng: Random, n=None) -> Turns:
    """Repeat a text exactly."""
    if rng.random() < 0.15:
        w, n = pick(rng, SIMPLE_WORDS), rng.randint(2, 12)
        return [
            user(pick(rng, [f"Say {w} {n} times.", f"Repeat the word {w} {n} times."])),
            assistant(" ".join([w] * n)),
        ], None
    p = phrase(rng, n)
    if rng.random() < 0.2:
        p = "\n".join(phrase(rng, n) for _ in range(rng.randint(2, 4)))
    question = pick(
        rng,
        [
            "Repeat exactly: ",
            "Repeat this: ",
            "Copy this text: ",
            "Say this back to me: ",
            "Repeat after me: ",
            "Echo: ",
        ],
    )
    messages = [user(question + p), assistant(p)]
    while rng.random() < 0.3 and len(messages) < 8:
        p = phrase(rng, n)
        messages += [user(question + p if rng.random() < 0.5 else "Now this: " + p), assistant(p)]
    return messages, None


def ask_sort(rng: Random) -> Turns:
    """Sort numbers; largest, smallest, n-th of a list."""
    n = rng.randint(2, 7)
    xs = [rng.randint(0, 9 if rng.random() < 0.4 else 99) for _ in range(n)]
    t = ", ".join(map(str, xs))
    chance = rng.random()
    if chance < 0.6:
        return [
            user(pick(rng, [f"Sort these numbers: {t}", f"Put in order from small to large: {t}"])),
            assistant(", ".join(map(str, sorted(xs)))),
        ], None
    if chance < 0.7:
        return [user(f"What is the largest of {t}?"), assistant(str(max(xs)))], None
    if chance < 0.8:
        return [user(f"What is the smallest of {t}?"), assistant(str(min(xs)))], None
    chosen_words = [pick(rng, SIMPLE_WORDS) for _ in range(n)]
    if chance < 0.9:
        i = rng.randrange(n if n < 5 else 5)
        return [
            user(
                f"What is the {words('first second third fourth fifth')[i]} word"
                f" of this list: {', '.join(chosen_words)}?"
            ),
            assistant(chosen_words[i]),
        ], None
    return [user(f"What is the last word of this list: {', '.join(chosen_words)}?"), assistant(chosen_words[-1])], None
