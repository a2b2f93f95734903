"""The sampling state that travels with a sequence's KV, inside the COMMIT of its transfer.

With it any worker goes on with the very tokens that the first one would have chosen: the random numbers are counted
from (seed, choice, index), so ids and parameters are all the state there is.
"""

from __future__ import annotations

import msgspec

from engines.params import SamplingParams


class TransferState(msgspec.Struct, frozen=True, array_like=True):
    """`num_tokens` of prompt + output have KV in the transferred blocks; `choices` may hold more ids than that."""

    prompt_ids: list[int]
    choices: list[list[int]]
    params: SamplingParams
    seed: int
    deadline_s: float  # from now, no wall clock of another host
    cached_tokens: int = 0
    tenant: str = ""
    priority: int = 0
    num_preemptions: int = 0  # so far, over all workers
    host_id: str = ""  # of the sender, whose monotonic clock `computed_s` is on: of use on that host only
    computed_s: float = 0.0  # when the last token of `choices` was there


encode_state = msgspec.msgpack.Encoder().encode
decode_state = msgspec.msgpack.Decoder(TransferState).decode
