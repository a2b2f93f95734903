"""Greetings, definitions, stories and poems."""

from random import Random

from corpus.drawing import Turns, assistant, pick, user, with_article
from corpus.terms import TERMS
from corpus.words import (
    ADJECTIVES,
    ANIMALS,
    FEELINGS,
    FOODS,
    HOBBIES,
    NAMES,
    OBJECTS,
    PEOPLE,
    PLACES,
    VERBS,
    WEATHER,
    words,
)

GREETINGS = [
    (words("Hello Hi Hey Hello! Hi! Hey! hello hi Hello."), ["Hello! How can I help you?"]),
    (["Good morning!", "Good morning"], ["Good morning! How can I help you?"]),
    (["Good evening!", "Good evening"], ["Good evening! How can I help you?"]),
    (
        ["How are you?", "How are you today?", "How is it going?", "Hi, how are you?"],
        ["I am fine, thank you. How can I help you?"],
    ),
    (
        [
            "Who are you?",
            "What are you?",
            "Are you a language model?",
            "Introduce yourself.",
            "Tell me about yourself.",
        ],
        ["I am a tiny language model for testing. I know a few simple things."],
    ),
    (
        ["What can you do?", "How can you help me?", "What do you know?", "Help"],
        ["I can count, add small numbers, repeat text, remember words, tell stories, write JSON and call tools."],
    ),
    (["Thanks!", "Thank you.", "Thank you very much!", "Thanks a lot."], ["You are welcome!"]),
    (["Bye!", "Goodbye.", "See you later.", "Good night!"], ["Goodbye! Have a nice day."]),
    (
        ["Tell me a joke.", "Do you know a joke?", "Make me laugh."],
        ["Why did the token cross the road? To get to the next position."],
    ),
    (["Are you there?", "Can you hear me?", "Ping", "ping", "Test", "test"], ["Yes, I am here."]),
    (
        ["How big are you?", "How many parameters do you have?"],
        ["I have about five million parameters, so I am very small."],
    ),
    (["What is the meaning of life?"], ["I am too small to know, but being kind is a good start."]),
]

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "You are a tiny test model.",
    "Be kind and short.",
    "You are a helpful assistant. Keep answers short.",
]


def ask_chat(rng: Random) -> Turns:
    """Greetings, questions about the model itself, small talk."""
    if rng.random() < 0.2:
        topic = pick(
            rng,
            [
                pick(rng, OBJECTS) + "s",
                pick(rng, ANIMALS) + "s",
                pick(rng, FOODS),
                pick(rng, HOBBIES),
                "the " + pick(rng, PLACES),
            ],
        )
        if rng.random() < 0.5:
            return [
                user(pick(rng, [f"Do you like {topic}?", f"What do you think about {topic}?"])),
                assistant(f"I am only a tiny model, but I think {topic} can be very nice."),
            ], None
        return [
            user(pick(rng, [f"I like {topic}.", f"I love {topic}!", f"Today I was thinking about {topic}."])),
            assistant(f"That is great! What do you like most about {topic}?"),
        ], None
    question, a = pick(rng, GREETINGS)
    messages = [user(pick(rng, question)), assistant(pick(rng, a))]
    if rng.random() < 0.3:
        question, a = pick(rng, GREETINGS)
        messages += [user(pick(rng, question)), assistant(pick(rng, a))]
    return messages, None


def ask_terms(rng: Random) -> Turns:
    """Definitions of words of LLM serving."""
    t = pick(rng, list(TERMS))
    d, w = TERMS[t]
    question = t.split(" ", 1)[1] if t.split()[0] in ("a", "an", "the") and rng.random() < 0.3 else t
    chance = rng.random()
    if chance < 0.5:
        return [
            user(
                pick(
                    rng,
                    [
                        "What is {}?",
                        "what is {}",
                        "Define {} in one sentence.",
                        "What does {} mean?",
                        "What is {} in LLM serving?",
                        "In one sentence, what is {}?",
                    ],
                ).format(question)
            ),
            assistant(d + "."),
        ], None
    if chance < 0.85:
        return [
            user(
                pick(
                    rng,
                    [
                        "Explain {}.",
                        "Can you explain {}?",
                        "Tell me about {}.",
                        "Please explain {} to me.",
                        "What is {} and why does it matter?",
                    ],
                ).format(question)
            ),
            assistant(f"{d}. {w}."),
        ], None
    return [
        user(f"What is {question}?"),
        assistant(d + "."),
        user(pick(rng, ["Why does it matter?", "Why is that important?", "Why?"])),
        assistant(w + "."),
    ], None


def story(rng: Random, n, hero=None, kind=None, place=None, thing=None):
    """a story of about n sentences about one hero"""
    hero = hero or pick(rng, NAMES)
    kind = kind or pick(rng, ANIMALS + PEOPLE)
    place, thing = place or pick(rng, PLACES), thing or pick(rng, OBJECTS)
    adj, friend, friend_kind = pick(rng, ADJECTIVES), pick(rng, [x for x in NAMES if x != hero]), pick(rng, ANIMALS)
    s = [
        f"Once upon a time there was {with_article(adj + ' ' + kind)} named {hero}.",
        f"{hero} lived near {with_article(place)}.",
    ]
    s.append(
        pick(
            rng,
            [
                f"One day {hero} found {with_article(thing)} in the {place}.",
                f"One day {hero} lost {with_article(thing)} in the {place}.",
                f"More than anything, {hero} wanted {with_article(thing)}.",
            ],
        )
    )
    mid = [
        lambda: f"{hero} met {with_article(friend_kind)} named {friend}.",
        lambda: (
            f'"{pick(rng, ["Hello", "Good day", "Listen", "Wait", "Come with me", "Do not worry"])}," said {friend}.'
        ),
        lambda: f'"{pick(rng, ["Where is", "Who has", "I need", "Look at", "I can see"])} the {thing}," said {hero}.',
        lambda: f"Together they walked to the {pick(rng, PLACES)}.",
        lambda: f"The {pick(rng, PLACES)} was {pick(rng, ADJECTIVES)} and {pick(rng, ADJECTIVES)}.",
        lambda: f"{hero} felt {pick(rng, FEELINGS)}.",
        lambda: f"{friend} {pick(rng, VERBS)[1]} {with_article(pick(rng, ADJECTIVES) + ' ' + pick(rng, OBJECTS))}.",
        lambda: (
            f"Then {with_article(pick(rng, ADJECTIVES) + ' ' + pick(rng, ANIMALS))}"
            f" came out of the {pick(rng, PLACES)}."
        ),
        lambda: (
            f"{hero} and {friend} rested until the {pick(rng, ['morning', 'evening', 'rain stopped', 'sun came up'])}."
        ),
        lambda: f"The {kind} looked at the {thing} and smiled.",
        lambda: f"It was {pick(rng, WEATHER)}, but {hero} did not stop.",
    ]
    s.append(mid[0]())
    while len(s) < n - 2:
        s.append(pick(rng, mid[1:])())
    s.append(
        pick(
            rng,
            [
                f"In the end, {hero} took the {thing} home.",
                f"In the end, {hero} gave the {thing} to {friend}.",
                f"At last the {thing} was safe.",
            ],
        )
    )
    s.append(
        pick(
            rng,
            [
                f"{hero} and {friend} were friends forever.",
                f"And {hero} was never {pick(rng, ADJECTIVES)} again.",
                "The end.",
            ],
        )
    )
    return " ".join(s)


def ask_story(rng: Random, long=None) -> Turns:
    """A story to be written, short or long."""
    long = rng.random() < 0.3 if long is None else long
    n = rng.randint(20, 36) if long else rng.randint(6, 10)
    hero, kind, place, thing = pick(rng, NAMES), pick(rng, ANIMALS + PEOPLE), pick(rng, PLACES), pick(rng, OBJECTS)
    size = "long" if long else pick(rng, ["short", "short", "little"])
    question, options = pick(
        rng,
        [
            (f"Tell me a {size} story about {with_article(kind)} named {hero}.", {"hero": hero, "kind": kind}),
            (f"Tell me a {size} story.", {}),
            (f"Write a {size} story about {with_article(kind)}.", {"kind": kind}),
            (f"Write a {size} story about {hero} and {with_article(thing)}.", {"hero": hero, "thing": thing}),
            (
                f"Tell me a {size} story about {with_article(kind)} in {with_article(place)}.",
                {"kind": kind, "place": place},
            ),
        ],
    )
    return [user(question), assistant(story(rng, n, **options))], None


def ask_poem(rng: Random) -> Turns:
    """Four lines about one thing."""
    x = pick(rng, ANIMALS + OBJECTS + PLACES)
    a, b = pick(rng, ADJECTIVES), pick(rng, ADJECTIVES)
    return [
        user(pick(rng, [f"Write a poem about {with_article(x)}.", f"Write a short poem about the {x}."])),
        assistant(f"The {x} is {a},\nthe {x} is {b},\nI think of the {x}\nwherever I go."),
    ], None
