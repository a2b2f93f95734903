"""Sums and counting."""

from random import Random

from corpus.drawing import Turns, assistant, held_out, pick, user
from corpus.words import NUMBER_WORDS


def draw_sum(rng: Random, split):
    """One calculation `(a, operator, b, result)`.

    `split` "train" never gives a held-out pair of a sum or difference; any other gives only such pairs.
    """
    while True:
        chance = rng.random()
        if chance < 0.45:
            hi = 10 if rng.random() < 0.25 else 100
            a, b, op = rng.randrange(hi), rng.randrange(hi), "+"
            c = a + b
        elif chance < 0.75:
            hi = 10 if rng.random() < 0.25 else 100
            a, b, op = rng.randrange(hi), rng.randrange(hi), "-"
            a, b = max(a, b), min(a, b)
            c = a - b
        else:
            a, b, op = rng.randrange(1, 13), rng.randrange(1, 13), "*"
            c = a * b
        if (
            (op == "*" and split == "train")
            or (op != "*" and held_out(a, b) == (split != "train"))
            or (op == "*" and split != "train")
        ):
            return a, op, b, c


OPERATOR_WORDS = {"+": "plus", "-": "minus", "*": "times"}


def ask_arith(rng: Random, split="train", multi=None) -> Turns:
    """One calculation, or several in a line."""
    if rng.random() < 0.55 if multi is None else multi:
        sums = [draw_sum(rng, split) for _ in range(rng.randint(2, 8))]
        return [
            user(pick(rng, ["Compute: ", "Solve: ", "Work out "]) + "; ".join(f"{a} {o} {b}" for a, o, b, _ in sums)),
            assistant("; ".join(f"{a} {o} {b} = {c}" for a, o, b, c in sums)),
        ], None
    a, o, b, c = draw_sum(rng, split)
    question = pick(
        rng,
        [
            f"What is {a} {o} {b}?",
            f"What is {a} {OPERATOR_WORDS[o]} {b}?",
            f"Compute {a} {o} {b}.",
            f"{a} {o} {b} = ?",
            f"How much is {a} {o} {b}?",
            f"{a} {o} {b}",
        ],
    )
    return [user(question), assistant(f"{a} {o} {b} = {c}")], None


def ask_count(rng: Random, long=False) -> Turns:
    """Counting up, down, in steps; numbers as words."""
    chance = rng.random()
    if long or chance < 0.5:
        a = 1 if rng.random() < 0.7 else rng.randint(2, 30)
        b = a + (rng.randint(30, 60) if long or rng.random() < 0.25 else rng.randint(4, 20))
        question = (
            f"Count from {a} to {b}."
            if a != 1 or rng.random() < 0.5
            else pick(rng, [f"Count to {b}.", f"Please count to {b}."])
        )
        return [user(question), assistant(", ".join(map(str, range(a, b + 1))))], None
    if chance < 0.65:
        a = rng.randint(5, 20)
        return [
            user(pick(rng, [f"Count down from {a} to 1.", f"Count backwards from {a}."])),
            assistant(", ".join(map(str, range(a, 0, -1)))),
        ], None
    if chance < 0.8:
        s, n = pick(rng, [2, 3, 5, 10]), rng.randint(5, 12)
        return [user(f"Count by {s}s up to {s * n}."), assistant(", ".join(str(s * i) for i in range(1, n + 1)))], None
    if chance < 0.9:
        n = rng.randint(0, 98)
        return [
            user(pick(rng, [f"What number comes after {n}?", f"Which number follows {n}?"])),
            assistant(str(n + 1)),
        ], None
    n = rng.randint(0, 20)
    if rng.random() < 0.5:
        return [user(f"Write the number {n} as a word."), assistant(NUMBER_WORDS[n])], None
    return [user(f"Write {NUMBER_WORDS[n]} as a number."), assistant(str(n))], None
