"""Which decode worker gets a sequence. Pure: beats in, an order out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from engines.messages import Target
from kvstore.link_report import LinkReport
from kvstore.state.records import WorkerBeat

# A transfer that takes this much longer is as bad as a worker that is full instead of empty. Transfers hide behind the
# compute as long as they are short; one of a second is what a user would wait for the first decoded token.
TRANSFER_S_PER_LOAD = 1.0


def is_target(beat: WorkerBeat, *, model: str, compat: str) -> bool:
    """Whether a worker may be handed sequences of `model` with this KV layout."""
    agrees = not compat or not beat.address.compat or beat.address.compat == compat
    return beat.role in ("decode", "both") and beat.model == model and agrees and not beat.draining


def find_caches(beats: Iterable[WorkerBeat], *, model: str, compat: str, incarnation: str) -> list[Target]:
    """Workers that keep prefixes of `model` for others, without the one that asks."""
    return [
        Target(beat.node, beat.address)
        for beat in sorted(beats, key=lambda beat: beat.node)
        if beat.role == "prefill"
        and beat.model == model
        and beat.address.compat == compat
        and beat.address.incarnation != incarnation
        and not beat.draining
    ]


def rank_targets(
    beats: Iterable[WorkerBeat],
    *,
    model: str,
    compat: str,
    host_id: str,
    assigned: Mapping[str, int] | None = None,
    links: Iterable[LinkReport] = (),
) -> list[Target]:
    """Decode workers, best first: dedicated ones, this host's, then by load and link speed together, then step time.

    Args:
        assigned: node -> sequences sent there since its last beat, which the beat cannot know yet.
        links: what our engine knows of its links; the fastest to a host counts.
    """
    extra = assigned or {}
    transfer_s: dict[str, float] = {}
    for link in links:
        transfer_s[link.host_id] = min(link.transfer_s, transfer_s.get(link.host_id, link.transfer_s))
    unmet_s = transfer_s.get("", 0.0)

    def load(beat: WorkerBeat) -> tuple[bool, bool, float, float, str]:
        num_seqs = beat.live + extra.get(beat.node, 0)
        used = 1.0 - beat.free_blocks / beat.num_blocks if beat.num_blocks else 1.0
        share = num_seqs / beat.max_num_seqs if beat.max_num_seqs else 1.0
        # The scarcer of the two decides: a node full of long sequences and one full of short ones are equally full.
        far = transfer_s.get(beat.address.host_id, unmet_s) / TRANSFER_S_PER_LOAD
        return (beat.role != "decode", beat.address.host_id != host_id, max(used, share) + far, beat.step_ms, beat.node)

    fitting = [beat for beat in beats if is_target(beat, model=model, compat=compat)]
    return [Target(beat.node, beat.address) for beat in sorted(fitting, key=load)]
