"""Tools, questions that need them, calls and results."""

from random import Random

from corpus.chat_format import dumps
from corpus.drawing import Turns, assistant, capitalize, made_up_word, pick, system, user
from corpus.facts import CITIES
from corpus.knowledge import ask_capital, ask_facts
from corpus.small_talk import SYSTEMS, ask_chat, ask_terms
from corpus.words import ADJECTIVES, NAMES, OBJECTS, PLACES, WEATHER


def tool_schema(name, desc, **params):
    """An OpenAI tool whose parameters are all required."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": desc,
            "parameters": {
                "type": "object",
                "properties": {k: {"type": t} for k, t in params.items()},
                "required": list(params),
            },
        },
    }


def about_a_city(verb):
    """Questions that fill the one parameter with a city."""

    def ask(rng, f):
        c = pick(rng, CITIES) if rng.random() < 0.8 else capitalize(made_up_word(rng))
        return pick(rng, verb).format(c), {f: c}

    return ask


def about_two_numbers(verb):
    """Questions that fill two parameters with numbers."""

    def ask(rng, f):
        a, b = rng.randrange(1000 if rng.random() < 0.3 else 100), rng.randrange(100)
        return pick(rng, verb).format(a, b), dict(zip(f.split(), (a, b), strict=True))

    return ask


def about_a_text(verb, gen):
    """Questions that fill the one parameter with what `gen` draws."""

    def ask(rng, f):
        x = gen(rng)
        return pick(rng, verb).format(x), {f: x}

    return ask


TOOLS = [
    # name, description, {param: type}, ask(r, params), reply(r, args) -> (result, answer)
    (
        "get_weather",
        "Get the weather in a city",
        {"city": "string"},
        about_a_city(
            [
                "What is the weather in {}?",
                "How is the weather in {}?",
                "Is it raining in {}?",
                "What's the weather like in {} today?",
            ]
        ),
        lambda rng, a: (
            lambda w, t: (
                {"weather": w, "temperature": t},
                f"It is {w} in {next(iter(a.values()))} and the temperature is {t} degrees.",
            )
        )(pick(rng, WEATHER), rng.randint(-9, 39)),
    ),
    (
        "get_time",
        "Get the local time in a city",
        {"city": "string"},
        about_a_city(["What time is it in {}?", "What is the local time in {}?", "Tell me the time in {}."]),
        lambda rng, a: (lambda t: ({"time": t}, f"It is {t} in {next(iter(a.values()))}."))(
            f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        ),
    ),
    (
        "add",
        "Add two numbers",
        {"a": "integer", "b": "integer"},
        about_two_numbers(
            ["Add {} and {}.", "What is {} plus {}?", "Use the tool to add {} and {}.", "What is {} + {}?"]
        ),
        lambda _rng, a: ({"result": sum(a.values())}, f"The result is {sum(a.values())}."),
    ),
    (
        "multiply",
        "Multiply two numbers",
        {"a": "integer", "b": "integer"},
        about_two_numbers(["Multiply {} by {}.", "What is {} times {}?", "What is {} * {}?"]),
        lambda _rng, a: (lambda x, y: ({"result": x * y}, f"The result is {x * y}."))(*a.values()),
    ),
    (
        "search",
        "Search the web",
        {"query": "string"},
        about_a_text(
            ["Search for {}.", "Search the web for {}.", "Look up {} on the web."],
            lambda rng: f"{pick(rng, ADJECTIVES)} {pick(rng, OBJECTS)}s" if rng.random() < 0.7 else made_up_word(rng),
        ),
        lambda rng, a: (lambda n: ({"hits": n}, f"I found {n} pages about {next(iter(a.values()))}."))(
            rng.randint(2, 99)
        ),
    ),
    (
        "send_message",
        "Send a message to a person",
        {"to": "string"},
        about_a_text(["Send a message to {}.", "Write to {}.", "Message {} for me."], lambda rng: pick(rng, NAMES)),
        lambda _rng, a: ({"status": "sent"}, f"I sent the message to {next(iter(a.values()))}."),
    ),
    (
        "set_timer",
        "Set a timer in minutes",
        {"minutes": "integer"},
        about_a_text(["Set a timer for {} minutes.", "Start a timer of {} minutes."], lambda rng: rng.randint(2, 99)),
        lambda _rng, a: ({"status": "ok"}, f"The timer is set for {next(iter(a.values()))} minutes."),
    ),
    (
        "play_song",
        "Play a song",
        {"title": "string"},
        about_a_text(
            ["Play the song {}.", "I want to hear the song {}."],
            lambda rng: capitalize(pick(rng, ADJECTIVES)) + " " + capitalize(pick(rng, OBJECTS)),
        ),
        lambda _rng, a: ({"status": "ok"}, f"Now playing {next(iter(a.values()))}."),
    ),
    (
        "get_user",
        "Get a user by number",
        {"id": "integer"},
        about_a_text(["Get user {}.", "Find the user with number {}."], lambda rng: rng.randint(1, 9999)),
        lambda rng, a: (lambda n: ({"name": n}, f"User {next(iter(a.values()))} is {n}."))(pick(rng, NAMES)),
    ),
    (
        "turn_on",
        "Turn on a device in a room",
        {"room": "string"},
        about_a_text(
            ["Turn on the light in the {}.", "Please turn on the lamp in the {}."], lambda rng: pick(rng, PLACES)
        ),
        lambda _rng, a: ({"status": "on"}, f"The light in the {next(iter(a.values()))} is on."),
    ),
]


def tool_call(name, args):
    """A call as OpenAI messages carry it, arguments as an object."""
    return {"type": "function", "function": {"name": name, "arguments": args}}


def ask_tools(rng: Random, direct=None, follow=None) -> Turns:
    """A choice of tools, a question, the call, and mostly its result and an answer."""
    chosen = rng.sample(TOOLS, pick(rng, [1, 1, 2, 2, 3, 3, 4]))
    tools, spec = [], []
    for name, desc, params, ask, reply in chosen:
        if rng.random() < 0.3:  # a name that is new to the model
            name = pick(
                rng,
                [
                    f"{pick(rng, ['do', 'run', 'my', 'call', 'fetch'])}_{made_up_word(rng, 2)}",
                    f"{name}_{rng.randint(1, 9)}",
                    f"{made_up_word(rng, 2)}_{name}",
                ],
            )
        if len(params) == 1 and rng.random() < 0.2:
            params = {pick(rng, ["value", "x", "arg", made_up_word(rng, 2)]): next(iter(params.values()))}
        tools.append(tool_schema(name, desc, **params))
        spec.append((name, params, ask, reply))
    messages = [system(pick(rng, SYSTEMS))] if rng.random() < 0.4 else []
    if direct if direct is not None else rng.random() < 0.12:  # a question that needs no tool
        return messages + pick(rng, [ask_chat, ask_capital, ask_facts, ask_terms])(rng)[0][:2], tools
    for _ in range(pick(rng, [1, 1, 2])):
        name, params, ask, reply = pick(rng, spec)
        question, args = ask(rng, " ".join(params))
        messages += [user(question), {"role": "assistant", "content": "", "tool_calls": [tool_call(name, args)]}]
        if follow is False or (follow is None and rng.random() < 0.3):
            break
        res, ans = reply(rng, args)
        messages += [{"role": "tool", "content": dumps(res)}, assistant(ans)]
    return messages, tools
