"""Draws words, sentences and messages. `rng` decides everything, so a seed fixes a conversation."""

from random import Random
from typing import Any

from corpus.words import (
    ADJECTIVES,
    ADVERBS,
    ALPHABET,
    ANIMALS,
    COLORS,
    NAMES,
    OBJECTS,
    PEOPLE,
    PLACES,
    SIMPLE_WORDS,
    SYLLABLES,
    TIMES,
    UNICODE_WORDS,
    VERBS,
)

Message = dict[str, Any]
Turns = tuple[list[Message], list[Message] | None]  # the messages of a conversation, and its tools


def pick(rng: Random, items):
    """One of `items`; faster than `choice`."""
    return items[int(rng.random() * len(items))]


def with_article(word):
    """A noun phrase with "a" or "an"."""
    return ("an " if word[0].lower() in "aeiou" else "a ") + word


def capitalize(text):
    """First letter upper case, the rest as it is."""
    return text[0].upper() + text[1:]


def user(text):
    """A message of the user."""
    return {"role": "user", "content": text}


def assistant(text):
    """A message of the assistant."""
    return {"role": "assistant", "content": text}


def system(text):
    """A system message."""
    return {"role": "system", "content": text}


def made_up_word(rng: Random, n=None):
    """a made-up word such as 'motaku'"""
    return "".join(pick(rng, SYLLABLES) for _ in range(n or rng.randint(2, 4)))


def held_out(a, b):
    """1 in 12 pairs of numbers is never used in training arithmetic"""
    return (a * 31 + b * 17) % 12 == 5


def sentence(rng: Random):
    """one filler sentence"""
    chance = rng.random()
    v = pick(rng, VERBS)[1]
    if chance < 0.22:
        return f"{pick(rng, NAMES)} {v} the {pick(rng, ADJECTIVES)} {pick(rng, OBJECTS)} {pick(rng, TIMES)}."
    if chance < 0.40:
        return f"The {pick(rng, PEOPLE)} {v} {with_article(pick(rng, OBJECTS))} near the {pick(rng, PLACES)}."
    if chance < 0.55:
        return (
            f"The {pick(rng, ANIMALS)} in the {pick(rng, PLACES)}"
            f" was {pick(rng, ADJECTIVES)} and {pick(rng, ADJECTIVES)}."
        )
    if chance < 0.68:
        return (
            f"{capitalize(pick(rng, TIMES))}, {with_article(pick(rng, ADJECTIVES) + ' ' + pick(rng, PEOPLE))}"
            f" {v} {pick(rng, NAMES)}'s {pick(rng, OBJECTS)}."
        )
    if chance < 0.80:
        return (
            f"There is {with_article(pick(rng, ADJECTIVES) + ' ' + pick(rng, PLACES))} behind the {pick(rng, PLACES)}."
        )
    if chance < 0.90:
        return (
            f"{pick(rng, NAMES)} and {pick(rng, NAMES)} {v}"
            f" {rng.randint(2, 99)} {pick(rng, ADJECTIVES)} {pick(rng, OBJECTS)}s."
        )
    return (
        f"It was {with_article(pick(rng, ADJECTIVES))} day at the {pick(rng, PLACES)}"
        f", so {pick(rng, NAMES)} {v} the {pick(rng, ANIMALS)} {pick(rng, ADVERBS)}."
    )


def phrase(rng: Random, n=None):
    """something to copy"""
    chance, n = rng.random(), n or rng.randint(2, 8)
    if chance < 0.35:
        return " ".join(pick(rng, SIMPLE_WORDS) for _ in range(n))
    if chance < 0.5:
        return sentence(rng)
    if chance < 0.62:
        return " ".join(made_up_word(rng) for _ in range(max(1, n - 2)))
    if chance < 0.74:
        return " ".join(str(rng.randint(0, 999)) for _ in range(n))
    if chance < 0.84:
        return "-".join(pick(rng, SIMPLE_WORDS + NAMES) for _ in range(n))
    if chance < 0.93:
        return " ".join(pick(rng, UNICODE_WORDS) if rng.random() < 0.5 else pick(rng, SIMPLE_WORDS) for _ in range(n))
    return "".join(pick(rng, ALPHABET + ALPHABET.upper() + "0123456789") for _ in range(n + 2))


def code_value(rng: Random):
    """the value of a needle"""
    chance = rng.random()
    if chance < 0.3:
        return made_up_word(rng, 3)
    if chance < 0.5:
        return f"{pick(rng, COLORS)}-{pick(rng, ANIMALS)}"
    if chance < 0.7:
        return f"{pick(rng, COLORS)}-{pick(rng, OBJECTS)}-{rng.randint(10, 99)}"
    if chance < 0.85:
        return str(rng.randint(1000, 99999))
    return f"{pick(rng, SIMPLE_WORDS)} {pick(rng, SIMPLE_WORDS)}"
