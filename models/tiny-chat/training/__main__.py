"""Command line of the training, see the package's docstring."""

import argparse
from pathlib import Path

import training


def main():
    """One of `tokenizer`, `train` and `export`."""
    parser = argparse.ArgumentParser(
        "python -m training", description=training.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenizer", "train", "export"])
    parser.add_argument("--out", default="model", help="folder for the tokenizer, checkpoints and the exported model")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--decay", type=int, default=550, help="steps of falling learning rate at the end")
    parser.add_argument("--tokens", type=int, default=2600, help="tokens per step (at least)")
    parser.add_argument("--micro", type=int, default=2048, help="padded tokens per forward pass (at least)")
    parser.add_argument("--lr", type=float, default=2e-3, help="AdamW: embedding and norms")
    parser.add_argument("--muon-lr", type=float, default=4e-3, help="Muon: all other matrices")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--resume", help="checkpoint to start from (default: OUT/train.pt when it is there)")
    parser.add_argument("--init", help="safetensors file to go on from, with fresh optimizers")
    parser.add_argument("--first-step", type=int, default=0, help="with --init: place in the curriculum")
    parser.add_argument("--first-shard", type=int, default=0, help="with --init: first shard of conversations")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="do without a C++ compiler")
    args = parser.parse_args()
    out = Path(args.out)
    if args.what == "tokenizer":
        from training.tokenizer import make_tokenizer

        make_tokenizer(out)
    elif args.what == "train":
        from training.loop import train

        train(args)
    else:
        from training.export import export

        export(out, Path(args.resume) if args.resume else out / "train.pt")


if __name__ == "__main__":
    main()
