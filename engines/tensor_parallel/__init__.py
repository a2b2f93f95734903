"""Tensor parallel engines: N ranks compute one model, each some heads and a slice of each MLP.

    engine process = rank 0: messages, schedulers, KV node, sampling        one step: (ids, positions, slots, tables)
       └─ socketpair ─▶ rank 1 .. N-1: the same layers on their slice       all: sums after `o` and `down` (gloo)

All ranks of a worker are on one host and share one KV region; each reads and writes its heads in it, as strided views.
So blocks, grants, transfers and prefix caches are those of any worker, and workers of different N hand over to each
other as equals. After Megatron-LM (Shoeybi et al., 2019). A rank's death is the engine's death, noticed by EOF.
"""
