"""The settings of a cluster: one typed tree, read by every process.

Field names follow vLLM's where it has one. Units end a name (`_ms`, `_s`, `_bytes`, `_tokens`); sizes are written with
their unit ("2GiB"). Each field says what it is for, and its range: `docs/configuration.md` is made from this file.
Where a value came from is kept by `configs.loader`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Dtype = Literal["auto", "float32", "bfloat16"]
Protocol = Literal["auto", "shm", "tcp", "rdma"]
Port = Annotated[int, Meta(ge=0, le=65535)]


class ModelSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The model that the cluster serves."""

    path: Annotated[str, Meta(min_length=1, description="Folder with a Hugging Face model, or a hub id.")] = (
        "models/tiny-chat"
    )
    served_model_name: Annotated[str, Meta(description="Name in the API. Empty: the last part of `path`.")] = ""
    revision: Annotated[str, Meta(description="Branch, tag or commit on the hub. Empty: the default branch.")] = ""
    dtype: Annotated[Dtype, Meta(description="Type of weights and KV. `auto`: float32 or bfloat16 by device.")] = "auto"
    max_model_len: Annotated[
        int, Meta(ge=0, description="Longest sequence, prompt and output, in tokens. 0: what the model's config says.")
    ] = 0

    @property
    def name(self) -> str:
        return self.served_model_name or self.path.rstrip("/").rsplit("/", 1)[-1]


class KVSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The KV region of each worker. A prefill and a decode worker may differ in `block_size`: KV is converted."""

    block_size: Annotated[int, Meta(ge=1, le=1024, description="Tokens per block, a power of two.")] = 32
    num_blocks: Annotated[int, Meta(ge=0, description="Blocks per worker. 0: as many as `memory_bytes` holds.")] = 0
    memory_bytes: Annotated[int, Meta(ge=1 << 20, description="Memory for KV per worker.")] = 1 << 30
    bounce_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Host memory per worker through which the KV of GPUs moves. 0: room for four of the longest "
            "sequences, but at most 2GiB or two; on CPUs none, since KV lies where peers write it. More than 0 on a "
            "CPU takes the way of a GPU, which is slower: for tests.",
        ),
    ] = 0
    direct: Annotated[
        Literal["auto", "on", "off"],
        Meta(
            description="With `transfer.protocol: rdma` peers write KV where it lies on a GPU, without `bounce_bytes`. "
            "`auto`: where that is given and the device is a GPU. `off`: through host memory. `on`: demand it; on a "
            "CPU private memory takes the way of a GPU's: for tests.",
        ),
    ] = "auto"
    enable_prefix_caching: Annotated[bool, Meta(description="Find full blocks of earlier prompts again.")] = True
    eviction: Annotated[Literal["lru", "fifo"], Meta(description="Which cached block goes first.")] = "lru"
    swap_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="Host memory per decode worker for sequences that wait while blocks lack; used as needed. "
            "0: they move to another worker, or are computed again.",
        ),
    ] = 1 << 29
    share_prefixes: Annotated[
        bool, Meta(description="Decode workers write full blocks back; prefill workers fetch prefixes from each other.")
    ] = True
    host_cache_bytes: Annotated[
        int, Meta(ge=0, description="Host memory per worker for cached blocks that the region evicts. 0: none.")
    ] = 0
    disk_cache_bytes: Annotated[
        int,
        Meta(ge=0, description="Disk per worker behind `host_cache_bytes`; its blocks outlive a restart. 0: none."),
    ] = 0
    disk_cache_dir: Annotated[
        str, Meta(description="Where; each worker has a folder of its own in it. Empty: `kv-cache` in the run folder.")
    ] = ""


class RoleSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What prefill and decode workers have in common."""

    num_workers: Annotated[int, Meta(ge=0, le=4096, description="Workers that `celeriac up` starts.")] = 1
    hardware: Annotated[
        str, Meta(description="What these figures were written for, such as `H100`. `up` says if it is not here.")
    ] = ""
    device: Annotated[Literal["auto", "cpu", "cuda"], Meta(description="Where the engine computes.")] = "auto"
    tensor_parallel_size: Annotated[int, Meta(ge=1, le=64, description="Ranks that share one model.")] = 1
    max_batch_size: Annotated[int, Meta(ge=1, le=65536, description="Prompts in one prefill batch.")] = 32
    max_num_seqs: Annotated[int, Meta(ge=1, le=65536, description="Sequences in one step.")] = 64
    max_num_batched_tokens: Annotated[int, Meta(ge=1, le=1 << 20, description="Tokens computed in one step.")] = 2048


class EngineSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the engine computes with. `auto` takes the fastest that works on the machine, and the log says which."""

    linear: Annotated[
        Literal["auto", "torch", "onednn", "native"],
        Meta(description="Linear layers. On CPUs `onednn` and `native` pack the weights once; `native` needs g++."),
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "torch", "native"],
        Meta(description="Attention, norms, rotation. `native` is C++, compiled at first use; needs g++."),
    ] = "auto"
    deterministic: Annotated[
        bool,
        Meta(
            description="Start only if bfloat16 tokens depend on nothing but their request: not on batch, chunks or a "
            "recovery. With native linears and kernels that always holds, and costs nothing."
        ),
    ] = False
    quantization: Annotated[
        Literal["none", "int8", "int4"],
        Meta(
            description="Store weights of linear layers in 8 or 4 bits, rounded when the model is loaded; the head in "
            "8. Needs native linears. All workers of a model must agree."
        ),
    ] = "none"
    quantization_group: Annotated[
        Literal["32", "64", "128"],
        Meta(description="Inputs that share a scale with `int4`. Fewer are more exact and a little slower."),
    ] = "64"
    cuda_graphs: Annotated[
        Literal["auto", "off"],
        Meta(
            description="Record decode steps as graphs and launch each as one. `auto`: on GPUs, checked against the "
            "plain step at first use; never on CPUs."
        ),
    ] = "auto"
    itl_slo_ms: Annotated[
        float,
        Meta(
            ge=0,
            le=60_000,
            description="Keep the gap between two tokens of a sequence below this, by smaller prompt chunks beside "
            "decode rows and fewer sequences at a time. 0: off.",
        ),
    ] = 0.0
    speculation: Annotated[
        Literal["off", "ngram"],
        Meta(
            description="Guess the next tokens and verify several in one step; the output stays the same. "
            "`ngram`: what followed the last tokens earlier in the sequence."
        ),
    ] = "off"
    speculation_tokens: Annotated[int, Meta(ge=1, le=64, description="Guesses of a sequence in one step, at most.")] = 8
    speculation_ngram_min: Annotated[
        int, Meta(ge=1, le=16, description="Tokens that must have occurred before, for a guess.")
    ] = 2
    speculation_ngram_max: Annotated[
        int, Meta(ge=1, le=64, description="Of all places where they did, one with so many in common is taken at once.")
    ] = 5
    speculation_max_seqs: Annotated[
        int, Meta(ge=1, le=65536, description="Steps with more sequences guess nothing: they have no time left over.")
    ] = 4


class PrefillSettings(RoleSettings, kw_only=True, forbid_unknown_fields=True):
    """Workers that compute prompts and push their KV away."""

    target_utilization: Annotated[
        float, Meta(gt=0, le=1, description="A batch starts when its estimated use of the device reaches this.")
    ] = 0.85
    batch_wait_ms: Annotated[
        float, Meta(ge=0, le=10_000, description="... or when its oldest prompt has waited this long.")
    ] = 50.0
    batching: Annotated[
        Literal["packed", "bucketed"], Meta(description="Prompts end to end without padding, or by length buckets.")
    ] = "packed"


class DecodeSettings(RoleSettings, kw_only=True, forbid_unknown_fields=True):
    """Workers that receive KV and generate."""

    watermark: Annotated[
        float, Meta(ge=0, le=0.5, description="Share of blocks kept free, so that admitting does not cause preempting.")
    ] = 0.01


class BothSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Monolithic workers (role `both`). Their batches and steps follow the settings of `decode`."""

    num_workers: Annotated[int, Meta(ge=0, le=4096, description="Workers that `celeriac up` starts.")] = 0


class TransferSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How KV moves between workers."""

    protocol: Annotated[
        Protocol, Meta(description="`auto`: the best that both sides have. `rdma` needs the extra `rdma`.")
    ] = "auto"
    gbps: Annotated[
        float, Meta(ge=0, le=10_000, description="Gbit/s between hosts, until transfers have shown it; 0: unknown.")
    ] = 0.0
    checksum: Annotated[bool, Meta(description="Check the bytes of each transfer before a token is made of them.")] = (
        True
    )
    compression: Annotated[
        Literal["none", "fp8", "int8"],
        Meta(description="KV in one byte per value on the network (tcp), where both workers set the same. Lossy."),
    ] = "none"
    layer_group_bytes: Annotated[
        int, Meta(ge=4096, le=1 << 30, description="Layers are pushed in groups of at least this size.")
    ] = 1 << 20
    bind_host: Annotated[str, Meta(min_length=1, description="Address on which workers listen for KV.")] = "127.0.0.1"
    advertise_host: Annotated[
        str, Meta(description="Address that other workers dial for KV; empty: `transfer.bind_host`.")
    ] = ""
    tls: Annotated[
        Literal["off", "on"],
        Meta(description="TLS between hosts; each worker shows a certificate. Pages by rdma are not encrypted."),
    ] = "off"
    tls_certificate: Annotated[str, Meta(description="PEM file: the certificate of this host.")] = ""
    tls_key: Annotated[str, Meta(description="PEM file: its private key.")] = ""
    tls_ca: Annotated[str, Meta(description="PEM file: the CA that signs the workers' certificates.")] = ""
    tls_check_host: Annotated[
        bool, Meta(description="The certificate of a dialled worker must name the address that was dialled.")
    ] = True
    grant_lease_s: Annotated[float, Meta(gt=0, le=3600, description="A grant that nobody renews ends after this.")] = (
        5.0
    )
    fence_kill_s: Annotated[
        float,
        Meta(gt=0, le=3600, description="A writer of this host that leaves a fence unanswered this long is ended."),
    ] = 3.0


class StateSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Redis >= 7 or Valkey >= 7.2: messages and request state. Unset: `up` starts a Valkey of its own."""

    broker_url: Annotated[str, Meta(pattern=r"^(redis|rediss|sentinel|unix)://", description="Celery's broker.")] = (
        "redis://127.0.0.1:6379/0"
    )
    state_url: Annotated[str, Meta(pattern=r"^(redis|rediss|unix)://", description="Records, logs and feeds.")] = (
        "redis://127.0.0.1:6379/1"
    )
    num_shards: Annotated[int, Meta(ge=1, le=100, description="Slots that request state is spread over.")] = 1
    visibility_timeout_s: Annotated[
        int, Meta(ge=5, le=86_400, description="A dead worker's messages come back after this.")
    ] = 30


class GatewaySettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The HTTP front end."""

    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port; 0 takes a free one.")] = 8000
    workers: Annotated[int, Meta(ge=1, le=256, description="Gateway processes.")] = 1
    threads: Annotated[int, Meta(ge=4, le=10_000, description="Calls that one gateway process serves at once.")] = 320
    max_body_bytes: Annotated[int, Meta(ge=1024, le=1 << 30, description="Longest request body.")] = 8 << 20
    default_timeout_s: Annotated[float, Meta(gt=0, le=86_400, description="Deadline of a request that names none.")] = (
        600.0
    )
    unknown_fields: Annotated[
        Literal["warn", "reject"], Meta(description="Body fields that no API has: name them in a header, or refuse.")
    ] = "warn"
    duplicate_keys: Annotated[
        Literal["reject", "last"], Meta(description="The same key twice in a body: refuse, or take the last.")
    ] = "reject"


class FlowerSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Flower, Celery's own web page."""

    enabled: Annotated[bool, Meta(description="Start it with `up`.")] = True
    host: Annotated[str, Meta(min_length=1, description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[Port, Meta(description="Port; 0 takes a free one.")] = 5555
    basic_auth: Annotated[
        str, Meta(pattern=r"^($|[^:]+:.+$)", description="`user:password`, required on any address but loopback.")
    ] = ""


class WorkerSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Times of every worker."""

    drain_timeout_s: Annotated[
        float, Meta(ge=0, le=86_400, description="A stopping worker finishes what it has for at most this long.")
    ] = 30.0
    engine_start_timeout_s: Annotated[
        float, Meta(gt=0, le=86_400, description="Loading the weights may take this long.")
    ] = 300.0


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Everything. `configs.load` fills `run_dir` and `secret_file` with absolute paths."""

    model: ModelSettings = msgspec.field(default_factory=ModelSettings)
    kv: KVSettings = msgspec.field(default_factory=KVSettings)
    engine: EngineSettings = msgspec.field(default_factory=EngineSettings)
    prefill: PrefillSettings = msgspec.field(default_factory=PrefillSettings)
    decode: DecodeSettings = msgspec.field(default_factory=DecodeSettings)
    both: BothSettings = msgspec.field(default_factory=BothSettings)
    transfer: TransferSettings = msgspec.field(default_factory=TransferSettings)
    state: StateSettings = msgspec.field(default_factory=StateSettings)
    gateway: GatewaySettings = msgspec.field(default_factory=GatewaySettings)
    flower: FlowerSettings = msgspec.field(default_factory=FlowerSettings)
    worker: WorkerSettings = msgspec.field(default_factory=WorkerSettings)
    run_dir: Annotated[
        str, Meta(description="Folder of a local cluster. Empty: `$XDG_STATE_HOME/celeriac/default`.")
    ] = ""
    secret_file: Annotated[
        str, Meta(description="File with the cluster secret. Empty: `secret` in the run folder.")
    ] = ""
