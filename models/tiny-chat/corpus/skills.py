"""All skills with their shares, and endless conversations made of them."""

import random
from random import Random

from corpus.arithmetic import ask_arith, ask_count
from corpus.drawing import Turns, pick, system
from corpus.json_answers import ask_json
from corpus.knowledge import ask_capital, ask_facts, ask_order
from corpus.memory import ask_memory
from corpus.recall import ask_recall
from corpus.small_talk import SYSTEMS, ask_chat, ask_poem, ask_story, ask_terms
from corpus.text_tasks import ask_copy, ask_letters, ask_sort
from corpus.tool_use import ask_tools


def ask_mixed(rng: Random) -> Turns:
    """several unrelated turns in one conversation"""
    messages = [system(pick(rng, SYSTEMS))] if rng.random() < 0.6 else []
    for _ in range(rng.randint(2, 5)):
        messages += pick(
            rng,
            [
                ask_capital,
                ask_facts,
                ask_chat,
                ask_order,
                ask_arith,
                ask_terms,
                ask_copy,
                ask_letters,
                ask_sort,
                ask_count,
                ask_json,
            ],
        )(rng)[0]
    return messages, None


SKILLS = {
    "chat": (ask_chat, 4),
    "terms": (ask_terms, 7),
    "story": (ask_story, 3),
    "poem": (ask_poem, 1),
    "arith": (ask_arith, 12),
    "count": (ask_count, 4),
    "count_long": (lambda rng: ask_count(rng, True), 0.6),
    "order": (ask_order, 3),
    "letters": (ask_letters, 6),
    "copy": (ask_copy, 12),
    "sort": (ask_sort, 4),
    "capital": (ask_capital, 6),
    "facts": (ask_facts, 5),
    "recall": (ask_recall, 14),
    "memory": (ask_memory, 7),
    "json": (ask_json, 7),
    "tools": (ask_tools, 8),
    "mixed": (ask_mixed, 5),
}


def make_one(rng: Random, skill, **options):
    """One conversation of a skill, as a dict of `skill`, `messages` and `tools`."""
    messages, tools = SKILLS[skill][0](rng, **options)
    return {"skill": skill, "messages": messages, "tools": tools}


def stream(seed, n, maxlen=1500, boost=None):
    """n conversations; `maxlen` limits the length of recall texts, `boost` scales the share of skills"""
    rng = random.Random(seed)
    names = list(SKILLS)
    weights = [SKILLS[k][1] * (boost or {}).get(k, 1) for k in names]
    for skill in rng.choices(names, weights, k=n):
        messages, tools = ask_recall(rng, maxlen=maxlen) if skill == "recall" else SKILLS[skill][0](rng)
        if tools is None and messages[0]["role"] != "system" and rng.random() < 0.12:
            messages = [system(pick(rng, SYSTEMS)), *messages]
        yield {"skill": skill, "messages": messages, "tools": tools}
