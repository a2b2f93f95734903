"""A sequence: prompt and output tokens of one choice of a request, and how much of it has KV.

token_ids   [ prompt ........................ | output ........ ]
              ^0        ^num_computed_tokens                    ^num_tokens
Tokens before `num_computed_tokens` have KV in `block_table`. A step computes the next few; when it reaches
`num_tokens` it samples the token at index `len(output_token_ids)`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engines.params import SamplingParams

if TYPE_CHECKING:
    from engines.sampling.row import SamplingRow
    from engines.speculation.proposer import DraftHistory
    from engines.structured.state import GrammarState
from engines.prompt_scores import PromptScores


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned by the engine thread; the schedulers read and advance it.

    Attributes:
        num_samples: choices sampled when the prompt ends (n of a fresh request; 1 once forked).
        block_table: KV block ids in token order.
        num_cached_tokens: prompt tokens whose KV was found in the prefix cache.
        grammar: where its output stands in its constraint; before it is scheduled if it has one, else None.
        prompt_scores: logprobs of the prompt so far, where the request wants them.
        draft_history: what speculation keeps of it, once it guesses for it.
        sampling_row: what the sampler is told of it, made once.
        epoch: of the ownership it is computed under; its tokens carry it.
        owner: (epoch, token) in the request's record since it decodes here; None before, and it cannot be passed on.
        num_preemptions: how often its blocks were taken, over all workers.
        num_reserved_tokens: blocks for this many are taken at admission; 0: for what there is.
    """

    rid: str
    choice: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    output_token_ids: list[int] = field(default_factory=list)
    num_samples: int = 1
    arrival_s: float = 0.0
    deadline_s: float = float("inf")
    priority: int = 0
    tenant: str = ""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_preemptions: int = 0
    grammar: GrammarState | None = None
    epoch: int = 0
    owner: tuple[int, str] | None = None
    num_reserved_tokens: int = 0
    prompt_scores: PromptScores | None = None
    draft_history: DraftHistory | None = None
    sampling_row: SamplingRow | None = None

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether its prompt has to be computed for its logprobs. With a first token they have been told."""
        return self.params.prompt_logprobs is not None and not self.output_token_ids and self.num_samples > 0

    @property
    def seq_id(self) -> tuple[str, int]:
        return (self.rid, self.choice)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    def token_at(self, position: int) -> int:
        place = position - len(self.prompt_token_ids)
        return self.output_token_ids[place] if place >= 0 else self.prompt_token_ids[position]

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Token ids at positions [start, stop), over prompt and output."""
        num_prompt = len(self.prompt_token_ids)
        if stop <= num_prompt:
            return self.prompt_token_ids[start:stop]
        if start >= num_prompt:
            return self.output_token_ids[start - num_prompt : stop - num_prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - num_prompt]
