"""Endless batches of token ids with loss weights, decided entirely by the seed and the shard number."""

import random

import corpus
import torch

from training.shape import CONFIG, PADDED_LENGTHS, SPECIAL_TOKENS

CONVERSATIONS_PER_SHARD = 3000
MIN_READY_BATCHES = 40
# Open-ended answers cannot be predicted well; they must not drown the rest.
OPEN_ENDED_SKILLS = ("story", "count_long")


class Batches:
    """Batches `(ids, weights)`, both `[rows, padded length]`; `weights[i]` is that of predicting token i."""

    def __init__(self, tokenizer, seed, micro_tokens, shard=0):
        self.tokenizer, self.seed, self.micro_tokens, self.shard = tokenizer, seed, micro_tokens, shard
        self.start_id, self.end_id = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
        self.assistant_ids = tokenizer.encode("assistant\n").ids
        self.rows = {length: [] for length in PADDED_LENGTHS}
        self.ready, self.rng = [], random.Random(seed * 1000003 + shard)

    def step(self, num_tokens, maxlen, boost, drill_share=0.0, drill_lengths=()):
        """Batches of one step with at least `num_tokens` tokens, and how many they have (drill batches not counted)."""
        batches, num = [], 0
        if self.rng.random() < drill_share:
            batches.append(self._drill(self.rng.choice(drill_lengths)))
        while num < num_tokens:
            if len(self.ready) < MIN_READY_BATCHES:
                self._fill(maxlen, boost)
            batches.append(self.ready.pop())
            num += int((batches[-1][0] != 0).sum())
        return batches, num

    def _weights(self, ids, skill):
        """Full weight for the assistant's tokens, a little for the text of short prompts."""
        base = 0.1 if len(ids) < 200 else 0.0
        full = 0.4 if skill in OPEN_ENDED_SKILLS else 1.0
        weights, is_answer, header = [base] * len(ids), False, len(self.assistant_ids)
        for i, token_id in enumerate(ids):
            if token_id == self.start_id:
                is_answer = ids[i + 1 : i + 1 + header] == self.assistant_ids
                header_end = i + header
            elif is_answer and i > header_end:
                weights[i] = full
                is_answer = token_id != self.end_id
        return weights

    def _fill(self, maxlen, boost):
        """Make the next shard of conversations into batches."""
        seed = self.seed * 7919 + self.shard
        conversations = list(corpus.stream(seed, CONVERSATIONS_PER_SHARD, maxlen, boost))
        self.shard += 1
        encoded = self.tokenizer.encode_batch([corpus.render(c["messages"], c["tools"]) for c in conversations])
        for conversation, encoding in zip(conversations, encoded, strict=True):
            ids = encoding.ids
            length = next((length for length in PADDED_LENGTHS if length >= len(ids)), None)
            if length is None:
                continue
            row = self.rows[length]
            row.append((ids, self._weights(ids, conversation["skill"])))
            if len(row) * length >= self.micro_tokens:
                self.ready.append(_padded(row, length))
                row.clear()
        self.rng.shuffle(self.ready)

    def _drill(self, length):
        """Rows of random tokens in which phrases come back: the only way to lower the loss is to look them up."""
        rng, num_rows = self.rng, max(1, self.micro_tokens // length)
        x, w = torch.zeros(num_rows, length, dtype=torch.long), torch.zeros(num_rows, length)
        for i in range(num_rows):
            whole = rng.random() < 0.4  # one long passage again and again, or many short phrases
            size = rng.randint(8, length // 2) if whole else rng.randint(3, 9)
            count = 1 if whole else max(2, int(length / size * (0.3 + 0.3 * rng.random())))
            vocabulary = range(len(SPECIAL_TOKENS), CONFIG["vocab_size"])
            fresh = [rng.choices(vocabulary, k=size) for _ in range(count)]
            known, ids, weights = [], [], []
            while len(ids) < length:
                if fresh and (not known or rng.random() < 0.5):
                    phrase = fresh.pop()
                    known.append(phrase)
                    weights += [0.0] * size
                else:
                    phrase = rng.choice(known)
                    weights += [0.5 if whole else 0.0] + [0.5] * (size - 1)
                ids += phrase
            x[i], w[i] = torch.tensor(ids[:length]), torch.tensor(weights[:length])
        return x, w


def _padded(row, length):
    x, w = torch.zeros(len(row), length, dtype=torch.long), torch.zeros(len(row), length)
    for i, (ids, weights) in enumerate(row):
        x[i, : len(ids)], w[i, : len(weights)] = torch.tensor(ids), torch.tensor(weights)
    return x, w
