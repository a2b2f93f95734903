#!/usr/bin/env python3
"""Held-out accuracy by skill, with greedy decoding in transformers (float32 arithmetic on the bf16 weights).

    python evaluate.py --n 50               # prints a table
    python evaluate.py --prompts            # checks prompts.jsonl again, token by token
    python evaluate.py --quantization int8  # the same with weights rounded as `engine.quantization` rounds them

The conversations come from `corpus` with a seed that training does not use. Sums and differences use number pairs that
never occur in training; facts (capitals, definitions, opposites, ...) are the same as in training.
"""

import argparse
import json
import math
import random
import sys
import time
from functools import partial
from pathlib import Path

import corpus
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent
MAX_ANSWER_TOKENS = 600
MAX_PROMPT_COMPLETION = 64


# ---------------------------------------------------------------- questions
def last(conversation):
    """The conversation up to its last assistant message, its tools, and that message as text."""
    messages = conversation["messages"]
    i = max(j for j, message in enumerate(messages) if message["role"] == "assistant")
    text = corpus.render([messages[i]])
    return messages[:i], conversation["tools"], text[len("<|im_start|>assistant\n") : -len("<|im_end|>\n")]


def first(conversation):
    """The conversation up to its first assistant message, likewise."""
    messages = conversation["messages"]
    i = next(j for j, message in enumerate(messages) if message["role"] == "assistant")
    return last({"messages": messages[: i + 1], "tools": conversation["tools"]})


def ask(part, skill, **options):
    """A maker of questions of a skill; `part` is `first` or `last`."""
    return lambda rng: part(corpus.make_one(rng, skill, **options))


def ask_sum(operator):
    """A maker of calculations that training never shows."""

    def make(rng):
        while True:
            a, drawn, b, result = corpus.draw_sum(rng, "eval")
            if drawn == operator:
                return [corpus.user(f"What is {a} {operator} {b}?")], None, f"{a} {operator} {b} = {result}"

    return make


# ---------------------------------------------------------------- what counts as right
def is_exact(text, want):
    return text == want


def is_json(text, want):  # noqa: ARG001 - one interface for all checks
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def is_same_call(text, want):
    try:
        return _call_in(text) == _call_in(want)
    except (ValueError, IndexError):
        return False


def is_long(text, want):  # noqa: ARG001 - one interface for all checks
    return len(text) > 100


def _call_in(text):
    return json.loads(text.split("<tool_call>")[1].split("</tool_call>")[0])


TESTS = {
    "recall, 256 tokens": (ask(first, "recall", tokens=256, n=3), is_exact),
    "recall, 512 tokens": (ask(first, "recall", tokens=512, n=3), is_exact),
    "recall, 1024 tokens": (ask(first, "recall", tokens=1024, n=3), is_exact),
    "recall, 1500 tokens": (ask(first, "recall", tokens=1500, n=3), is_exact),
    "recall, 1 needle, 1500 tokens": (ask(first, "recall", tokens=1500, n=1), is_exact),
    "recall, 6 needles, last of 6 questions": (ask(last, "recall", tokens=512, n=6), is_exact),
    "memory over several turns": (ask(last, "memory", n=3, gap=3), is_exact),
    "copy exactly": (ask(first, "copy"), is_exact),
    "tool call exact": (ask(last, "tools", direct=False, follow=False), is_same_call),
    "answer from tool result": (ask(last, "tools", direct=False, follow=True), is_exact),
    "JSON valid": (ask(last, "json"), is_json),
    "JSON exact": (ask(last, "json"), is_exact),
    "add (unseen pairs)": (ask_sum("+"), is_exact),
    "subtract (unseen pairs)": (ask_sum("-"), is_exact),
    "multiply (seen pairs)": (ask_sum("*"), is_exact),
    "capitals": (ask(last, "capital"), is_exact),
    "definitions": (ask(last, "terms"), is_exact),
    "opposites, colors, sounds": (ask(last, "facts"), is_exact),
    "days, months, alphabet": (ask(last, "order"), is_exact),
    "spelling, reversing, case": (ask(last, "letters"), is_exact),
    "sorting, max, nth word": (ask(last, "sort"), is_exact),
    "counting": (ask(last, "count"), is_exact),
    "counting over 30 numbers": (ask(last, "count_long"), is_exact),
    "long story ends by itself": (ask(last, "story", long=True), is_long),
}
SLOW_TESTS = ("counting over 30 numbers", "long story ends by itself")
MAX_SLOW_TRIES = 20


# ---------------------------------------------------------------- the model
def load(folder):
    """Tokenizer and model, float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder), model


def round_weights(model, bits, group):
    """Give the linear layers the weights that the engine has with `engine.quantization`, and the head those of int8."""
    sys.path.insert(0, str(FOLDER.parents[1]))
    from engines.linear.quantize import quantize

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            is_head = name == "lm_head"
            num_in = module.weight.shape[1]
            width = num_in if is_head or bits == 8 else group
            numbers, scales = quantize(module.weight.data, bits=8 if is_head else bits, group=width)
            rounded = numbers.float() * scales.repeat_interleave(width, dim=1)[:, :num_in]
            module.weight = torch.nn.Parameter(rounded)  # the embedding, tied to the head, keeps its own


def prompt_ids(tokenizer, messages, tools):
    return tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)


@torch.inference_mode()
def complete(model, ids, max_new_tokens):
    """Greedy completion of one prompt, as ids."""
    x = torch.tensor([ids])
    output = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=max_new_tokens, do_sample=False)
    return output[0, len(ids) :].tolist()


def answer(tokenizer, model, messages, tools):
    """`(text, number of prompt tokens, number of answer tokens, whether it ended by itself)`"""
    ids = prompt_ids(tokenizer, messages, tools)
    output = complete(model, ids, MAX_ANSWER_TOKENS)
    ended = output[-1] in model.generation_config.eos_token_id
    text = tokenizer.decode(output[:-1] if ended else output, skip_special_tokens=False)
    return text, len(ids), len(output), ended


@torch.inference_mode()
def loss_of(tokenizer, model, messages, tools, want):
    """Of the wanted answer and its end: sum of -log p, number of tokens, whether greedy decoding gives just them.

    Last comes the number of prompt tokens.
    """
    ids = prompt_ids(tokenizer, messages, tools)
    wanted = [*tokenizer(want, add_special_tokens=False)["input_ids"], model.generation_config.eos_token_id[0]]
    logits = model(torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(wanted), reduction="sum")
    return loss.item(), len(wanted), logits.argmax(-1).tolist() == wanted, len(ids)


def check_prompts(tokenizer, model, path):
    """Whether every line of prompts.jsonl still has its prompt and completion ids."""
    prompts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    num_right = 0
    for i, prompt in enumerate(prompts):
        ids = prompt_ids(tokenizer, prompt["messages"], prompt["tools"])
        output = complete(model, ids, MAX_PROMPT_COMPLETION)
        if ids == prompt["prompt_ids"] and output == prompt["completion_ids"]:
            num_right += 1
        else:
            print("differs:", i, prompt["messages"][-1]["content"][:60])
    print(f"{num_right} of {len(prompts)} prompts give the expected tokens")


def run_test(reply, loss, name, num_tries, args):
    """Print the table's row of one test, and before it up to `args.show` wrong answers.

    Returns the numbers of right answers and of tries, the sum of losses and the number of tokens they are over.
    """
    make, is_right = TESTS[name]
    rng = random.Random(f"{args.seed} {name}")
    num_right = num_prompt = num_output = num_ended = num_shown = 0
    total_loss = num_wanted = 0
    for _ in range(num_tries):
        messages, tools, want = make(rng)
        lost, num_lost, is_greedy, prompt_tokens = loss(messages, tools, want)
        total_loss, num_wanted = total_loss + lost, num_wanted + num_lost
        if args.forced:
            num_right, num_ended = num_right + is_greedy, num_ended + is_greedy
            num_prompt, num_output = num_prompt + prompt_tokens, num_output + num_lost
            continue
        text, _, output_tokens, ended = reply(messages, tools)
        right = ended and is_right(text, want)
        num_right, num_ended = num_right + right, num_ended + ended
        num_prompt, num_output = num_prompt + prompt_tokens, num_output + output_tokens
        if not right and num_shown < args.show:
            num_shown += 1
            for label, shown in (("?", messages[-1]["content"][-120:]), ("want", want), ("got", text[:200])):
                print(f"  {label:4s} {shown!r}")
    print(
        f"| {name} | {100 * num_right / num_tries:.0f} % | {num_prompt / num_tries:.0f} "
        f"| {num_output / num_tries:.0f} | {100 * num_ended / num_tries:.0f} % |",
        flush=True,
    )
    return num_right, num_tries, total_loss, num_wanted


def main():
    """Print the table, or check prompts.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--n", type=int, default=50, help="conversations per skill")
    parser.add_argument("--seed", type=int, default=987654321)
    parser.add_argument("--only", default="", help="run the tests whose name contains this")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong answers per skill")
    parser.add_argument("--prompts", action="store_true", help="only check prompts.jsonl")
    parser.add_argument("--no-slow", action="store_true", help="leave out tests with answers of hundreds of tokens")
    parser.add_argument(
        "--forced",
        action="store_true",
        help="generate nothing: correct is an answer whose every token has the largest logit behind those before it",
    )
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--group", type=int, choices=(32, 64, 128), default=64, help="inputs per scale of int4")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer, model = load(args.model)
    if args.quantization != "none":
        round_weights(model, int(args.quantization.removeprefix("int")), args.group)
    if args.prompts:
        check_prompts(tokenizer, model, args.model / "prompts.jsonl")
        return
    print("| skill | correct | prompt tokens | answer tokens | ends by itself |\n|---|---|---|---|---|")
    start_s = time.monotonic()
    totals = [0, 0, 0, 0]
    for name in TESTS:
        if args.only in name and not (args.no_slow and name in SLOW_TESTS):
            num_tries = min(args.n, MAX_SLOW_TRIES) if name in SLOW_TESTS else args.n
            counted = run_test(
                partial(answer, tokenizer, model), partial(loss_of, tokenizer, model), name, num_tries, args
            )
            totals = [total + count for total, count in zip(totals, counted, strict=True)]
    num_right, num_tries, loss, num_wanted = totals
    perplexity = math.exp(loss / max(1, num_wanted))
    print(
        f"\n{num_right} of {num_tries} correct; perplexity of the wanted answers {perplexity:.4f} ({num_wanted} tokens)"
    )
    print(f"\n{time.monotonic() - start_s:.0f} s")


if __name__ == "__main__":
    main()
