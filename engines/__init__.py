"""The engine: models, KV memory, attention, sampling, schedulers, tokenizer, and the process that runs them.

Owns everything between token ids in and token ids out. Must not know Redis, Celery or HTTP, nor text (apart from
`engines.tokenizer`, which the front uses). `torch` is imported only by modules that the engine process runs:
`models.llama`, `models.loader`, `models.rope`, `models.row_ops`, `kv_region`, `attention.*`, `linear.*`, `ext.*`,
`sampling.*`, `runner`, `factory`, `build`.
Everything else here (messages, params, sequence, scheduler, errors, `models.config`) is plain Python, for the front,
the gateway and the planner as well. Import from the modules: this package re-exports nothing and costs nothing.
"""
