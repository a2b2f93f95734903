"""Values hidden in a long text, and the questions for them."""

from random import Random

from corpus.drawing import Turns, assistant, code_value, pick, sentence, system, user
from corpus.words import COLORS, NAMES, OBJECTS


def needle(rng: Random, used):
    """(sentence to hide, question, answer, value)"""
    chance, v = rng.random(), code_value(rng)
    if chance < 0.35 and "code word" not in used:
        key = "code word"
        return (
            key,
            pick(rng, ["The code word is {}.", "Remember this: the code word is {}.", "The code word is {}."]).format(
                v
            ),
            pick(
                rng,
                [
                    "What is the code word?",
                    "Find the code word.",
                    "Which code word is hidden in the text?",
                    "What was the code word?",
                ],
            ),
            f"The code word is {v}.",
            v,
        )
    if chance < 0.5 and "secret number" not in used:
        v = str(rng.randint(100, 99999))
        return (
            "secret number",
            f"The secret number is {v}.",
            pick(rng, ["What is the secret number?", "Find the secret number."]),
            f"The secret number is {v}.",
            v,
        )
    while True:
        if rng.random() < 0.5:
            n = pick(rng, NAMES)
            key = n
            sent, q, a = f"The code of {n} is {v}.", f"What is the code of {n}?", f"The code of {n} is {v}."
        else:
            n = f"{pick(rng, COLORS)} {pick(rng, OBJECTS)}"
            key = n
            sent, q, a = (
                f"The password for the {n} is {v}.",
                f"What is the password for the {n}?",
                f"The password for the {n} is {v}.",
            )
        if key not in used:
            return key, sent, q, a, v


def ask_recall(rng: Random, tokens=None, n=None, maxlen=1500) -> Turns:
    """hide n sentences in filler of about `tokens` tokens, then ask for them"""
    if tokens is None:
        tokens = int(40 * (maxlen / 40) ** rng.random())
    n = n or pick(rng, [1, 2, 3, 4, 5, 6])
    used, items = set(), []
    for _ in range(n):
        hidden = needle(rng, used)
        used.add(hidden[0])
        items.append(hidden)
    sentences, size = [], 0
    while size < tokens - 20 * n - 20:
        s = sentence(rng)
        size += int(1.18 * len(s.split())) + 1
        sentences.append(s)
    for hidden in items:
        sentences.insert(rng.randint(0, len(sentences)), hidden[1])
    lines, i = [], 0
    while i < len(sentences):
        j = i + rng.randint(3, 9)
        lines.append(" ".join(sentences[i:j]))
        i = j
    text = ("\n" if rng.random() < 0.5 else " ").join(lines)
    rng.shuffle(items)
    question = items[0][2]
    chance = rng.random()
    if chance < 0.5:
        messages = [
            user(
                pick(rng, ["Read this text.\n", "Read the text and answer the question.\n", "Here is a text:\n", ""])
                + text
                + "\n"
                + question
            )
        ]
    elif chance < 0.75:
        messages = [user(pick(rng, ["Answer the question about the text below. ", ""]) + question + "\n" + text)]
    else:
        messages = [system("Answer questions about this text.\n" + text), user(question)]
    messages.append(assistant(items[0][3]))
    for hidden in items[1:]:
        messages += [user(pick(rng, ["", "", "And "]) + hidden[2]), assistant(hidden[3])]
        if messages[-2]["content"].startswith("And "):
            messages[-2]["content"] = "And " + hidden[2][0].lower() + hidden[2][1:]
    return messages, None
