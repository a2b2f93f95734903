"""Questions about facts and orders."""

from random import Random

from corpus.drawing import Turns, assistant, capitalize, pick, user, with_article
from corpus.facts import CAPITALS, DAYS, MIXES, MONTH_LENGTHS, MONTHS, OPPOSITES, SEASONS, SOUNDS, THING_COLORS
from corpus.words import ALPHABET


def ask_order(rng: Random) -> Turns:
    """Days, months, letters: lists and neighbours."""
    chance = rng.random()
    if chance < 0.12:
        return [
            user(pick(rng, ["List the days of the week.", "Name the days of the week."])),
            assistant(", ".join(DAYS) + "."),
        ], None
    if chance < 0.24:
        return [
            user(pick(rng, ["List the months of the year.", "Name the months of the year."])),
            assistant(", ".join(MONTHS) + "."),
        ], None
    if chance < 0.32:
        return [
            user(pick(rng, ["Say the alphabet.", "What is the alphabet?", "Write the alphabet."])),
            assistant(" ".join(ALPHABET)),
        ], None
    if chance < 0.36:
        return [user("List the seasons."), assistant(", ".join(SEASONS) + ".")], None
    if chance < 0.44:
        m = pick(rng, MONTHS)
        return [user(f"How many days are in {m}?"), assistant(f"{m} has {MONTH_LENGTHS[m]} days.")], None
    xs, what = pick(rng, [(DAYS, "day"), (MONTHS, "month"), (list(ALPHABET), "letter")])
    i = rng.randrange(len(xs))
    if rng.random() < 0.6:
        j = (i + 1) % len(xs)
        if what == "letter" and j == 0:
            i, j = 0, 1
        return [
            user(pick(rng, [f"What {what} comes after {xs[i]}?", f"Which {what} follows {xs[i]}?"])),
            assistant(f"{xs[j]} comes after {xs[i]}."),
        ], None
    j = (i - 1) % len(xs)
    if what == "letter" and i == 0:
        i, j = 1, 0
    return [user(f"What {what} comes before {xs[i]}?"), assistant(f"{xs[j]} comes before {xs[i]}.")], None


def ask_capital(rng: Random) -> Turns:
    """Capitals of countries, both ways round."""
    c = pick(rng, list(CAPITALS))
    if rng.random() < 0.7:
        return [
            user(
                pick(
                    rng,
                    [
                        f"What is the capital of {c}?",
                        f"Name the capital of {c}.",
                        f"Which city is the capital of {c}?",
                        f"Tell me the capital of {c}.",
                        f"what is the capital of {c}",
                    ],
                )
            ),
            assistant(f"The capital of {c} is {CAPITALS[c]}."),
        ], None
    return [
        user(
            pick(
                rng,
                [f"{CAPITALS[c]} is the capital of which country?", f"Which country has the capital {CAPITALS[c]}?"],
            )
        ),
        assistant(f"{CAPITALS[c]} is the capital of {c}."),
    ], None


def ask_facts(rng: Random) -> Turns:
    """Opposites, colors, sounds, even and odd."""
    chance = rng.random()
    if chance < 0.4:
        a, b = pick(rng, OPPOSITES)
        if rng.random() < 0.5 and b not in ("light", "old"):
            a, b = b, a
        if a == "light":
            b = "dark"
        if a == "old":
            b = "new"
        return [
            user(pick(rng, [f"What is the opposite of {a}?", f"Give me the opposite of {a}."])),
            assistant(f"The opposite of {a} is {b}."),
        ], None
    if chance < 0.55:
        (a, b), c = pick(rng, list(MIXES.items()))
        if rng.random() < 0.5:
            a, b = b, a
        return [
            user(f"What color do you get if you mix {a} and {b}?"),
            assistant(f"{capitalize(a)} and {b} make {c}."),
        ], None
    if chance < 0.72:
        t = pick(rng, list(THING_COLORS))
        return [user(f"What color is {t}?"), assistant(f"{capitalize(t)} is {THING_COLORS[t]}.")], None
    if chance < 0.82:
        a = pick(rng, list(SOUNDS))
        return [
            user(f"What sound does {with_article(a)} make?"),
            assistant(f"{capitalize(with_article(a))} says {SOUNDS[a]}."),
        ], None
    if chance < 0.91:
        n = rng.randint(0, 99)
        return [user(f"Is {n} even or odd?"), assistant(f"{n} is {'odd' if n % 2 else 'even'}.")], None
    a, b = rng.sample(range(100), 2)
    return [user(f"Which is larger, {a} or {b}?"), assistant(f"{max(a, b)} is larger.")], None
