"""Command line of the generator, see the package's docstring."""

import argparse
import collections
import random

import corpus
from corpus import SKILLS, make_one, render, stream

NUM_COUNTED = 20_000


def main():
    """Print conversations, or how the skills are mixed."""
    parser = argparse.ArgumentParser(
        "python -m corpus", description=corpus.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=3, help="conversations (of each skill)")
    parser.add_argument("--skill", choices=list(SKILLS))
    parser.add_argument("--stats", action="store_true", help="only count characters and conversations by skill")
    args = parser.parse_args()
    if args.stats:
        print_stats(args.seed)
        return
    rng = random.Random(args.seed)
    for skill in [args.skill] if args.skill else SKILLS:
        for _ in range(args.n):
            conversation = make_one(rng, skill)
            print(f"===== {skill}\n{render(conversation['messages'], conversation['tools'])}")


def print_stats(seed):
    """Shares of the skills in conversations and in characters."""
    num_chars, num_conversations = collections.Counter(), collections.Counter()
    for conversation in stream(seed, NUM_COUNTED):
        skill = conversation["skill"]
        num_chars[skill] += len(render(conversation["messages"], conversation["tools"]))
        num_conversations[skill] += 1
    for skill in SKILLS:
        by_count = 100 * num_conversations[skill] / NUM_COUNTED
        by_chars = 100 * num_chars[skill] / num_chars.total()
        print(f"{skill:11s} {by_count:5.1f} % of conversations, {by_chars:5.1f} % of characters")


if __name__ == "__main__":
    main()
