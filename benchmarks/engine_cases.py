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


@dataclass(frozen=True)
class Roof:
    """What the machine reached when asked for nothing else."""

    bytes_per_s: float
    flops_per_s: float


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

    def roof_tokens_per_s(self, shape: Shape, roof: Roof, *, decode_tokens: int, dtype: str) -> float:
        """Tokens per second if every step were bound by memory or arithmetic alone, whichever is slower."""
        if self.phase == "decode":
            context = self.num_seqs * (self.input_len + decode_tokens // 2)
            num_bytes = shape.step_bytes(num_seqs=self.num_seqs, num_context_tokens=context, dtype=dtype)
            flops = shape.flops(num_tokens=self.num_seqs, num_seqs=self.num_seqs, num_context_tokens=context)
            num_tokens = self.num_seqs
        else:
            num_tokens = self.num_seqs * self.input_len
            num_bytes = shape.step_bytes(num_seqs=self.num_seqs, num_context_tokens=num_tokens, dtype=dtype)
            looked_at = num_tokens * (self.input_len + 1) // 2
            flops = shape.flops(num_tokens=num_tokens, num_seqs=self.num_seqs, num_context_tokens=looked_at)
        return num_tokens / max(num_bytes / roof.bytes_per_s, flops / roof.flops_per_s)

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
