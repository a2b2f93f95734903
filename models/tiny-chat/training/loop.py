"""The training loop: curriculum, learning rates, checkpoints, progress."""

import math
import time
from pathlib import Path

import torch
from torch import nn

from training.batches import Batches
from training.model import Llama
from training.shape import CONFIG

ALL_DRILL_LENGTHS = (64, 128, 256, 512, 1024, 1536)
DRILL_WEIGHT = 0.5  # tells a drill batch from conversations, whose highest weight is 0.4 or 1


def curriculum(step):
    """`(longest recall text, change of the skill shares, share of steps with a drill batch, length of its rows)`"""
    if step < 100:
        return 200, {"recall": 1.2, "copy": 1.5, "count_long": 0.3}, 1.0, (64, 128, 256)
    if step < 250:
        return 400, {}, 0.5, (128, 256, 512)
    if step < 450:
        return 800, {}, 0.3, (256, 512, 1024)
    if step < 700:
        return 1500, {}, 0.15, (512, 1024, 1536)
    if step < 1400:
        shares = {"copy": 2, "tools": 1.3, "json": 1.2, "terms": 0.6, "capital": 0.7, "chat": 0.6}
        return 1500, shares, 0.3, ALL_DRILL_LENGTHS
    shares = {"tools": 2, "json": 2.5, "letters": 2, "sort": 2, "order": 1.5, "story": 3, "recall": 0.8}
    return 1500, shares, 0.1, ALL_DRILL_LENGTHS


def rate_factor(step, *, first_step, num_steps, num_decay_steps):
    """Share of the full learning rate at `step`: short warm-up, constant, half a cosine down to 2 %."""
    if step >= num_steps - num_decay_steps:
        progress = (step - num_steps + num_decay_steps) / num_decay_steps
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1, (step + 1) / 60, (step - first_step + 1) / 10)


def train(args):
    """Train to `args.steps`: from `args.resume`, else OUT/train.pt, else `args.init`, else from nothing."""
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    trainer = Trainer(args)
    if args.compile:
        for layer in trainer.model.model.layers:
            layer.compile(dynamic=True)
    trainer.run()


class Trainer:
    """Model, optimizers and position in the stream of conversations: what a checkpoint holds."""

    def __init__(self, args):
        from tokenizers import Tokenizer

        self.args = args
        self.out = Path(args.out)
        self.model = Llama(CONFIG)
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        self.optimizers = [
            torch.optim.Muon(
                matrices, lr=args.muon_lr, weight_decay=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step, self.num_seen_tokens, shard = 0, 0, 0
        checkpoint = Path(args.resume) if args.resume else self.out / "train.pt"
        if checkpoint.exists():
            shard = self._resume(checkpoint)
        elif args.init:  # finished weights, fresh optimizers, conversations not seen before
            from safetensors.torch import load_file

            self.model.load_state_dict({name: weight.float() for name, weight in load_file(args.init).items()})
            self.step, shard = args.first_step, args.first_shard
        self.batches = Batches(Tokenizer.from_file(str(self.out / "tokenizer.json")), args.seed, args.micro, shard)

    def run(self):
        """Train to the end, saving on the way."""
        args = self.args
        print(f"{sum(p.numel() for p in self.model.parameters())} parameters")
        progress = _Progress(args, first_step=self.step)
        while self.step < args.steps:
            factor = rate_factor(
                self.step, first_step=progress.first_step, num_steps=args.steps, num_decay_steps=args.decay
            )
            for optimizer, rate in zip(self.optimizers, (args.muon_lr, args.lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * factor
            batches, num_tokens = self.batches.step(args.tokens, *curriculum(self.step))
            loss, drill_loss = self._backward(batches)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            self.step, self.num_seen_tokens = self.step + 1, self.num_seen_tokens + num_tokens
            progress.add(self, num_tokens, loss, drill_loss, norm, factor)
            is_stable_end = self.step == args.steps - args.decay
            if self.step % args.save_every == 0 or self.step == args.steps or is_stable_end:
                self.save("train.pt")
            if is_stable_end:
                self.save("stable.pt")

    def save(self, name):
        """Write a checkpoint; a stop in between leaves the one before."""
        path, partial = self.out / name, self.out / (name + ".tmp")
        torch.save(
            {
                "model": self.model.state_dict(),
                "opts": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "shard": self.batches.shard,
                "seen": self.num_seen_tokens,
            },
            partial,
        )
        partial.replace(path)

    def _resume(self, path):
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["opts"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.step, self.num_seen_tokens = state["step"], state["seen"]
        print(f"resumed at step {self.step}")
        return state["shard"]

    def _backward(self, batches):
        """Gradients of one step; returns the mean loss, and that of its drill batch (None without one)."""
        total = sum(float(w[:, 1:].sum()) for _, w in batches)
        loss, drill_loss = 0.0, None
        for x, w in batches:
            part = self.model(x, w) / total
            part.backward()
            if float(w.max()) == DRILL_WEIGHT:
                drill_loss = part.item() * total / float(w[:, 1:].sum())
            loss += part.item()
        return loss, drill_loss


class _Progress:
    """Prints a bar, smoothed losses, speed and the time left."""

    def __init__(self, args, *, first_step):
        self.args, self.first_step = args, first_step
        self.start_s, self.num_tokens, self.loss, self.drill_loss = time.monotonic(), 0, None, 8.0

    def add(self, trainer, num_tokens, loss, drill_loss, norm, factor):
        self.num_tokens += num_tokens
        self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        if drill_loss is not None:
            self.drill_loss = 0.9 * self.drill_loss + 0.1 * drill_loss
        step, num_steps = trainer.step, self.args.steps
        if step % 20 and step != num_steps:
            return
        elapsed_s = time.monotonic() - self.start_s
        left_min = elapsed_s / (step - self.first_step) * (num_steps - step) / 60
        bar = "#" * (30 * step // num_steps)
        print(
            f"[{bar:<30}] {step}/{num_steps} loss {self.loss:.3f} drill {self.drill_loss:.2f} grad {norm:.2f} "
            f"lr {self.args.lr * factor:.1e} {trainer.num_seen_tokens / 1e6:.2f}M tokens "
            f"{self.num_tokens / elapsed_s:.0f}/s left {left_min:.1f} min",
            flush=True,
        )
