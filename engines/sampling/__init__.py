"""Sampling: from a step's logits to token ids and log-probabilities, vectorised over the rows of the batch.

Owns the order of operations (`sampler`), penalties and biases (`adjust`), exact truncated choice (`choose`), random
numbers that depend on (seed, choice, index) alone (`randomness`), and logprobs. Must not know schedulers, KV or text.
The modules import torch and are therefore imported by name.
"""
