"""Answers that are one JSON object."""

from random import Random

from corpus.chat_format import dumps
from corpus.drawing import Turns, assistant, pick, system, user, with_article
from corpus.facts import CAPITALS, CITIES
from corpus.words import ANIMALS, COLORS, FOODS, NAMES, PEOPLE, SIMPLE_WORDS


def ask_json(rng: Random) -> Turns:
    """Answers that are one JSON object."""
    n, age, city, job, c = pick(rng, NAMES), rng.randint(5, 95), pick(rng, CITIES), pick(rng, PEOPLE), pick(rng, COLORS)
    full = {
        "name": n,
        "age": age,
        "city": city,
        "job": job,
        "color": c,
        "pet": pick(rng, ANIMALS),
        "food": pick(rng, FOODS),
    }
    sent = {
        "name": f"The person is called {n}.",
        "age": f"{n} is {age} years old.",
        "city": f"{n} lives in {city}.",
        "job": f"{n} works as {with_article(job)}.",
        "color": f"The favorite color of {n} is {c}.",
        "pet": f"{n} has {with_article(full['pet'])}.",
        "food": f"{n} likes {full['food']}.",
    }
    chance = rng.random()
    if chance < 0.55:
        keys = rng.sample(list(full), rng.randint(1, 5))
        said = rng.sample(keys + rng.sample([x for x in full if x not in keys], 1), len(keys) + 1)
        key_text = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]
        question = pick(
            rng,
            [
                f"Reply in JSON with key{'s' if len(keys) > 1 else ''} {key_text}.",
                f"Give me JSON with the key{'s' if len(keys) > 1 else ''} {key_text}.",
            ],
        )
        text = " ".join(sent[x] for x in said)
        ans = assistant(dumps({x: full[x] for x in keys}))
        place = rng.random()
        if place < 0.4:
            return [user(f"{question} {text}"), ans], None
        if place < 0.8:
            return [user(f"{text} {question}"), ans], None
        return [system(question), user(text), ans], None
    if chance < 0.67:
        a, b = rng.randrange(50), rng.randrange(50)
        return [
            user(f"Reply in JSON with keys a, b and sum. Add {a} and {b}."),
            assistant(dumps({"a": a, "b": b, "sum": a + b})),
        ], None
    if chance < 0.78:
        c = pick(rng, list(CAPITALS))
        return [
            user(f"Reply in JSON with keys country and capital. What is the capital of {c}?"),
            assistant(dumps({"country": c, "capital": CAPITALS[c]})),
        ], None
    if chance < 0.9:
        chosen_words = [pick(rng, SIMPLE_WORDS) for _ in range(rng.randint(2, 6))]
        return [
            user(f"Reply in JSON with key items. Make a list of: {', '.join(chosen_words)}"),
            assistant(dumps({"items": chosen_words})),
        ], None
    w = pick(rng, SIMPLE_WORDS)
    b = rng.random() < 0.5
    return [
        user(f"Reply in JSON with keys word and {'found' if b else 'upper'}. The word is {w}."),
        assistant(dumps({"word": w, "found": True} if b else {"word": w, "upper": w.upper()})),
    ], None
