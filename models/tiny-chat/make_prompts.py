#!/usr/bin/env python3
"""Writes prompts.jsonl: chat prompts with the greedy completion that transformers gives, and prints logit margins.

    python make_prompts.py

The weights are upcast to float32. One line per prompt:
    skill, messages, tools, prompt_ids, completion_ids (at most 64, with the end token), text,
    min_margin (smallest top-1 minus top-2 logit on the way), answer (the right answer, null if open-ended)
For every skill several candidates are tried; correct ones with a margin of at least --margin are preferred, so that
other kernels and number formats have a fair chance to give the same tokens. Stories are kept as they come.
"""

import argparse
import json
import random
from pathlib import Path

import corpus
import torch
import transformers
from evaluate import FOLDER, MAX_PROMPT_COMPLETION, ask, ask_sum, complete, first, last, load, prompt_ids
from transformers import AutoModelForCausalLM

THRESHOLDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


def fixed(text, want=None):
    """A maker of always the same question."""
    return lambda _rng: ([corpus.user(text)], None, want)


def unicode_copy(rng):
    """Copying of words with letters of several tokens each."""
    chosen = [
        corpus.pick(rng, corpus.UNICODE_WORDS) if i % 2 else corpus.pick(rng, corpus.SIMPLE_WORDS) for i in range(6)
    ]
    text = " ".join(chosen)
    return [corpus.user("Repeat exactly: " + text)], None, text


def recall_of(num_tokens):
    """A maker of recall questions with one to three needles."""
    return lambda rng: first(corpus.make_one(rng, "recall", tokens=num_tokens, n=rng.randint(1, 3)))


def story(long):
    """A maker of stories; no answer is the right one."""
    return lambda rng: (*last(corpus.make_one(rng, "story", long=long))[:2], None)


def plan():
    """`(skill, maker)` of every line of the file."""
    for text in ("Hello!", "Who are you?", "What can you do?", "Tell me a joke.", "Thank you."):
        yield "chat", fixed(text)
    counts = {"terms": 5, "capital": 3, "order": 2, "letters": 2, "sort": 2, "facts": 2, "copy": 3}
    for skill, count in counts.items():
        yield from [(skill, ask(last, skill))] * count
    yield from [("copy", unicode_copy)] * 2
    yield from [("arith", ask_sum(operator)) for operator in "+-*"]
    yield "count", fixed("Count to 30.", ", ".join(map(str, range(1, 31))))
    yield "count_long", fixed("Count from 1 to 60.", ", ".join(map(str, range(1, 61))))
    for num_tokens in (128, 200, 256, 384, 512, 640, 768, 900, 1024, 1200, 1350, 1500):
        yield "recall", recall_of(num_tokens)
    for num_tokens in (300, 700, 1300):
        yield "recall", ask(last, "recall", tokens=num_tokens, n=3)
    for gap in (0, 2, 3, 4):
        yield "memory", ask(last, "memory", n=3, gap=gap)
    yield from [("json", ask(last, "json"))] * 4
    yield from [("tools", ask(last, "tools", direct=False, follow=False))] * 4
    yield from [("tools", ask(last, "tools", direct=False, follow=True))] * 2
    yield "tools", ask(last, "tools", direct=True)
    for long in (False, False, True):
        yield "story", story(long)


@torch.inference_mode()
def completion_logits(model, prompt):
    """`[completion tokens, vocabulary]`, float32: the logits that each token was chosen from."""
    x = torch.tensor([prompt["prompt_ids"] + prompt["completion_ids"]])
    return model(x).logits[0, len(prompt["prompt_ids"]) - 1 : -1].float()


def margins(logits):
    """Distance of the best logit to the second, per step."""
    top = logits.topk(2).values
    return top[:, 0] - top[:, 1]


def is_right(prompt):
    """True also for an open-ended prompt, and for an answer that is right as far as it goes."""
    want, text = prompt["answer"], prompt["text"]
    was_cut = len(prompt["completion_ids"]) == MAX_PROMPT_COMPLETION
    return want is None or text == want or (was_cut and want.startswith(text))


def best_prompt(tokenizer, model, skill, make, rng, seen, args):
    """The best of several candidates: right, and with a good margin."""
    best = None
    for _ in range(args.tries):
        messages, tools, want = make(rng)
        ids = prompt_ids(tokenizer, messages, tools)
        if best and (tuple(ids) in seen or ids == best[1]["prompt_ids"]):
            continue
        completion = complete(model, ids, MAX_PROMPT_COMPLETION)
        prompt = {"skill": skill, "messages": messages, "tools": tools, "prompt_ids": ids, "completion_ids": completion}
        prompt["text"] = tokenizer.decode(completion, skip_special_tokens=True)
        prompt["min_margin"] = round(float(margins(completion_logits(model, prompt)).min()), 4)
        prompt["answer"] = want
        score = (is_right(prompt), min(prompt["min_margin"], args.margin))
        if best is None or score > best[0]:
            best = (score, prompt)
        if score == (True, args.margin) or skill == "story":
            break
    return best[1]


def print_margins(prompts, model, half):
    """Margins over all steps, and what bfloat16 arithmetic (`half`) does to logits and tokens."""
    all_margins, num_same_steps, difference, changed = [], 0, 0.0, []
    for prompt in prompts:
        full_logits, half_logits = completion_logits(model, prompt), completion_logits(half, prompt)
        all_margins += margins(full_logits).tolist()
        num_same_steps += int((full_logits.argmax(-1) == half_logits.argmax(-1)).sum())
        difference = max(difference, float((full_logits - half_logits).abs().max()))
        if complete(half, prompt["prompt_ids"], MAX_PROMPT_COMPLETION) != prompt["completion_ids"]:
            changed.append((prompt["skill"], prompt["min_margin"]))
    lengths = [len(prompt["prompt_ids"]) for prompt in prompts]
    margin = torch.tensor(all_margins)
    quantiles = [float(margin.quantile(q)) for q in (0.01, 0.05, 0.5)]
    print(
        f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {len(margin)} decoding steps, "
        f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    )
    print("wrong answers:", [prompt["skill"] for prompt in prompts if not is_right(prompt)])
    print("margin: smallest {:.3f}, 1 % {:.2f}, 5 % {:.2f}, median {:.2f}".format(margin.min(), *quantiles))
    for threshold in THRESHOLDS:
        print(f"steps with a margin below {threshold}: {int((margin < threshold).sum())}")
    print(f"largest difference of a logit between bfloat16 and float32: {difference:.3f}")
    print(
        f"steps where bfloat16 has the same best token: {num_same_steps} of {len(margin)}; "
        f"completions that stay the same: {len(prompts) - len(changed)} of {len(prompts)}; changed: {changed}"
    )
    for skill in sorted({prompt["skill"] for prompt in prompts}):
        smallest = min(prompt["min_margin"] for prompt in prompts if prompt["skill"] == skill)
        print(f"  {skill:11s} smallest margin {smallest:.3f}")


def main():
    """Write the file, then print its margins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=FOLDER)
    parser.add_argument("--out", type=Path, help="default: prompts.jsonl in the model's folder")
    parser.add_argument("--margin", type=float, default=0.5)
    parser.add_argument("--tries", type=int, default=12)
    parser.add_argument("--seed", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer, model = load(args.model)
    rng, prompts, seen = random.Random(args.seed), [], set()
    for skill, make in plan():
        prompt = best_prompt(tokenizer, model, skill, make, rng, seen, args)
        prompts.append(prompt)
        seen.add(tuple(prompt["prompt_ids"]))
    with (args.out or args.model / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(json.dumps(prompt, ensure_ascii=False) + "\n")
    print_margins(prompts, model, AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval())


if __name__ == "__main__":
    main()
