"""Facts told in one turn and asked for in a later one."""

from random import Random

from corpus.arithmetic import ask_arith
from corpus.drawing import Turns, assistant, pick, system, user, with_article
from corpus.facts import CITIES
from corpus.knowledge import ask_capital, ask_facts, ask_order
from corpus.small_talk import SYSTEMS, ask_chat, ask_terms
from corpus.words import ANIMALS, COLORS, FOODS, HOBBIES, NAMES, PEOPLE


def personal_facts(rng: Random):
    """(what the user says, reply, question, answer)"""
    n, c = pick(rng, NAMES), pick(rng, COLORS)
    pet, pet_name, city = pick(rng, ANIMALS), pick(rng, NAMES), pick(rng, CITIES)
    food, hobby, num, job = pick(rng, FOODS), pick(rng, HOBBIES), rng.randint(1, 99), pick(rng, PEOPLE)
    return {
        "name": (
            pick(rng, [f"My name is {n}.", f"I am {n}.", f"Hi, my name is {n}."]),
            f"Nice to meet you, {n}!",
            pick(rng, ["What is my name?", "Do you remember my name?", "Who am I?"]),
            f"Your name is {n}.",
        ),
        "color": (
            pick(rng, [f"My favorite color is {c}.", f"My favourite colour is {c}."]),
            f"I will remember that you like {c}.",
            pick(rng, ["What is my favorite color?", "What is my favourite colour?"]),
            f"Your favorite color is {c}.",
        ),
        "pet": (
            f"I have {with_article(pet)} named {pet_name}.",
            f"{pet_name} is a nice name for {with_article(pet)}.",
            pick(rng, [f"What is the name of my {pet}?", "What is the name of my pet?"]),
            f"Your {pet} is named {pet_name}.",
        ),
        "city": (
            pick(rng, [f"I live in {city}.", f"My home is in {city}."]),
            f"{city} is a nice place to live.",
            pick(rng, ["Where do I live?", "Which city do I live in?"]),
            f"You live in {city}.",
        ),
        "food": (
            f"My favorite food is {food}.",
            f"I hear that {food} is very good.",
            "What is my favorite food?",
            f"Your favorite food is {food}.",
        ),
        "hobby": (
            f"My hobby is {hobby}.",
            f"I hope you have fun with {hobby}.",
            "What is my hobby?",
            f"Your hobby is {hobby}.",
        ),
        "number": (
            f"My lucky number is {num}.",
            f"I will remember the number {num}.",
            "What is my lucky number?",
            f"Your lucky number is {num}.",
        ),
        "job": (
            f"I work as {with_article(job)}.",
            f"Being {with_article(job)} must be interesting.",
            "What is my job?",
            f"You work as {with_article(job)}.",
        ),
    }


def ask_memory(rng: Random, n=None, gap=None) -> Turns:
    """Facts that the user tells, and questions about them some turns later."""
    known = personal_facts(rng)
    keys = rng.sample(list(known), n or rng.randint(1, 4))
    messages = []
    if rng.random() < 0.5:
        if rng.random() < 0.4:
            assistant_name = pick(rng, NAMES)
            messages.append(
                system(
                    f"Your name is {assistant_name}."
                    + pick(rng, ["", " You are a helpful assistant.", " Answer briefly."])
                )
            )
        else:
            messages.append(system(pick(rng, SYSTEMS)))
    joint = len(keys) > 1 and rng.random() < 0.35
    if joint:
        messages += [user(" ".join(known[k][0] for k in keys)), assistant(known[keys[0]][1])]
    else:
        for k in keys:
            messages += [user(known[k][0]), assistant(known[k][1])]
    for _ in range(rng.randint(0, 4) if gap is None else gap):
        messages += pick(rng, [ask_capital, ask_facts, ask_chat, ask_order, ask_arith, ask_terms])(rng)[0][:2]
    ks = keys[:]
    rng.shuffle(ks)
    if messages[0]["role"] == "system" and messages[0]["content"].startswith("Your name is") and rng.random() < 0.7:
        assistant_name = messages[0]["content"].split(".")[0].split()[-1]
        messages += [
            user(pick(rng, ["What is your name?", "Who are you?"])),
            assistant(f"My name is {assistant_name}."),
        ]
    for k in ks:
        messages += [user(known[k][2]), assistant(known[k][3])]
    return messages, None
