"""What `celeriac bench engine` measures: decode at three batch sizes, prefill of three batches. Pure.

A job is a batch of equal prompts, timed from the first request to the last token. Prefill is a job with one output
token; decode is what `decode_tokens` more tokens cost: the difference of two jobs. Every program is timed this way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.engine_shapes import Shape

RunJob = Callable[[dict[str, Any]], dict[str, float]]
DECODE_INPUT_LEN: Final = 64
MAX_NUM_BATCHED_TOKENS: Final = 4096  # of every engine: a prompt of 2048 or four of 512 are one step


@dataclass(frozen=True)
class Roof:
    """What the machine reached when asked for nothing else."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Work:
    """What one step of a case cannot do without: `num_tokens` computed, bytes read, floating-point operations."""

    num_tokens: int
    num_bytes: float
    flops: float

    def tokens_per_s(self, roof: Roof) -> float:
        """Were the step bound by memory or arithmetic alone, whichever is slower."""
        return self.num_tokens / max(self.num_bytes / roof.bytes_per_s, self.flops / roof.flops_per_s)


@dataclass(frozen=True)
class Case:
    """`phase`: "decode" or "prefill"; `input_len`: tokens of each prompt; `goal`: of the ratio to vLLM."""

    name: str
    phase: str
    num_seqs: int
    input_len: int
    goal: float

    def measure(self, run: RunJob, *, decode_tokens: int, seed: int) -> float:
        """Tokens per second: generated ones for decode, prompt tokens for prefill."""
        prefill_s = run(self._job(1, seed=2 * seed))["seconds"]
        if self.phase == "prefill":
            return self.num_seqs * self.input_len / prefill_s
        whole_s = run(self._job(1 + decode_tokens, seed=2 * seed + 1))["seconds"]
        # A disturbance may make the shorter job the longer one: there is no number then.
        return self.num_seqs * decode_tokens / (whole_s - prefill_s) if whole_s > prefill_s else float("nan")

    def work(self, shape: Shape, *, decode_tokens: int, dtype: str) -> Work:
        """Of a decode step at the mean context, or of the whole prefill as one step."""
        if self.phase == "decode":
            num_tokens = self.num_seqs
            context = looked_at = self.num_seqs * (self.input_len + decode_tokens // 2)
        else:
            num_tokens = context = self.num_seqs * self.input_len
            looked_at = num_tokens * (self.input_len + 1) // 2
        return Work(
            num_tokens,
            shape.step_bytes(num_seqs=self.num_seqs, num_context_tokens=context, dtype=dtype),
            shape.flops(num_tokens=num_tokens, num_seqs=self.num_seqs, num_context_tokens=looked_at),
        )

    def _job(self, output_len: int, *, seed: int) -> dict[str, Any]:
        return {
            "num_requests": self.num_seqs,
            "concurrency": self.num_seqs,
            "input_len": self.input_len,
            "output_len": output_len,
            "seed": seed,
        }


CASES: Final = (
    Case("decode_b1", "decode", 1, DECODE_INPUT_LEN, 1.2),
    Case("decode_b8", "decode", 8, DECODE_INPUT_LEN, 1.2),
    Case("decode_b32", "decode", 32, DECODE_INPUT_LEN, 1.1),
    Case("prefill_1x512", "prefill", 1, 512, 1.0),
    Case("prefill_4x512", "prefill", 4, 512, 1.0),
    Case("prefill_1x2048", "prefill", 1, 2048, 1.0),
)
