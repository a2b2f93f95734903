"""The settings of a cluster: one typed tree, read by every process.

Field names follow vLLM's where it has one. Units end a name (`_ms`, `_s`, `_bytes`, `_tokens`); sizes in YAML are
written with their unit ("2GiB"). Where a value came from is kept by `configs.loader`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["auto", "float32", "bfloat16"]
Protocol = Literal["auto", "shm", "tcp", "rdma"]


class ModelSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    path: str = "models/tiny-chat"  # folder or hub id
    served_model_name: str = ""  # "": last part of the path
    revision: str = ""
    dtype: Dtype = "auto"
    max_model_len: int = 0  # 0: what the model's config says

    @property
    def name(self) -> str:
        return self.served_model_name or self.path.rstrip("/").rsplit("/", 1)[-1]


class KVSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    block_size: int = 32
    num_blocks: int = 0  # 0: as many as `memory_bytes` holds
    memory_bytes: int = 1 << 30  # per worker
    enable_prefix_caching: bool = True
    eviction: Literal["lru", "fifo"] = "lru"


class RoleSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    num_workers: int = 1
    hardware: str = ""  # what the preset was written for; `up` compares it with this machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel_size: int = 1
    max_batch_size: int = 32
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048


class PrefillSettings(RoleSettings, kw_only=True, forbid_unknown_fields=True):
    target_utilization: float = 0.85
    batch_wait_ms: float = 50.0
    batching: Literal["packed", "bucketed"] = "packed"


class DecodeSettings(RoleSettings, kw_only=True, forbid_unknown_fields=True):
    watermark: float = 0.01  # share of blocks kept free so that admitting does not cause preempting


class TransferSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    protocol: Protocol = "auto"
    gbps: float = 0.0  # what the preset expects of the link
    checksum: bool = True
    layer_group_bytes: int = 1 << 20
    bind_host: str = "127.0.0.1"
    grant_lease_s: float = 5.0
    fence_kill_s: float = 3.0


class StateSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    broker_url: str = "redis://127.0.0.1:6379/0"
    state_url: str = "redis://127.0.0.1:6379/1"
    num_shards: int = 1
    visibility_timeout_s: int = 30


class GatewaySettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 320
    max_body_bytes: int = 8 << 20
    default_timeout_s: float = 600.0
    unknown_fields: Literal["warn", "reject"] = "warn"
    duplicate_keys: Literal["reject", "last"] = "reject"


class FlowerSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = 5555
    basic_auth: str = ""  # user:password, required on any address but loopback


class WorkerSettings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    drain_timeout_s: float = 30.0
    engine_start_timeout_s: float = 300.0


class Settings(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: ModelSettings = msgspec.field(default_factory=ModelSettings)
    kv: KVSettings = msgspec.field(default_factory=KVSettings)
    prefill: PrefillSettings = msgspec.field(default_factory=PrefillSettings)
    decode: DecodeSettings = msgspec.field(default_factory=DecodeSettings)
    transfer: TransferSettings = msgspec.field(default_factory=TransferSettings)
    state: StateSettings = msgspec.field(default_factory=StateSettings)
    gateway: GatewaySettings = msgspec.field(default_factory=GatewaySettings)
    flower: FlowerSettings = msgspec.field(default_factory=FlowerSettings)
    worker: WorkerSettings = msgspec.field(default_factory=WorkerSettings)
    run_dir: str = ""  # "": $XDG_STATE_HOME/celeriac/default
    secret_file: str = ""  # "": <run_dir>/secret
