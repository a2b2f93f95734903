"""Put an engine together from its config: model, KV region, pool, scheduler, KV node, core."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass

import torch
import xxhash

from configs.schema import RoleSettings, Settings
from engines.core import EngineCore
from engines.factory import build_engine_model, choose_device, choose_dtype
from engines.finish import FinishRule
from engines.kv_region import KVTensor
from engines.messages import EngineMessage
from engines.models.config import ModelConfig
from engines.models.source import resolve_model
from engines.process import EngineConfig
from engines.runner import ModelRunner
from engines.scheduler import DecodeScheduler, PrefillScheduler
from kvstore.address import KVAddress
from kvstore.blocks import BlockPool, PrefixCache
from kvstore.clock import now_s
from kvstore.transport import KVNode


@dataclass(frozen=True)
class Engine:
    """The parts that the process's main loop and its `Ready` message need."""

    core: EngineCore
    node: KVNode
    address: KVAddress
    num_blocks: int
    block_size: int
    max_model_len: int
    dtype: str
    device: str
    num_threads: int


def build_engine(config: EngineConfig, send: Callable[[EngineMessage], None]) -> Engine:
    """Load the weights and allocate the region; then listen for peers.

    Raises:
        EngineError: the model or the device cannot be used; the message says why.
    """
    settings = config.settings
    role = settings.prefill if config.role == "prefill" else settings.decode
    torch.set_grad_enabled(False)
    if config.cpus:
        torch.set_num_threads(len(config.cpus))
    device = choose_device(role.device)
    dtype = choose_dtype(settings.model.dtype, device)
    folder = resolve_model(settings.model.path, settings.model.revision)
    model, model_config = build_engine_model(folder, dtype=dtype, device=device)
    max_model_len = settings.model.max_model_len or model_config.max_position_embeddings

    block_bytes = KVTensor.bytes_per_block(model_config, settings.kv.block_size, dtype)
    num_blocks = settings.kv.num_blocks or max(1, settings.kv.memory_bytes // block_bytes)
    region = KVTensor.create(model_config, num_blocks=num_blocks, block_size=settings.kv.block_size, dtype=dtype)
    pool = BlockPool(num_blocks)
    cache = None
    if settings.kv.enable_prefix_caching:
        cache = PrefixCache(pool, settings.kv.block_size, policy=settings.kv.eviction)
    node = KVNode(
        incarnation=config.incarnation,
        region=region.shared,
        secret=config.secret,
        compat=compat_hash(folder.digest, model_config, settings, str(dtype)),
        protocols=("shm", "tcp") if settings.transfer.protocol == "auto" else (settings.transfer.protocol,),
        run_dir=settings.run_dir,
        bind=settings.transfer.bind_host,
        checksum=settings.transfer.checksum,
    )
    runner = ModelRunner(model, region, device=device, dtype=dtype)
    core = EngineCore(
        role=config.role,
        incarnation=config.incarnation,
        scheduler=_scheduler(config.role, settings, pool, cache),
        runner=runner,
        pool=pool,
        node=node,
        finish_rule=FinishRule(frozenset(model_config.eos_token_ids), max_model_len),
        send=send,
        clock=now_s,
        block_size=settings.kv.block_size,
        block_bytes=block_bytes,
        layer_group_bytes=settings.transfer.layer_group_bytes,
        max_num_seqs=role.max_num_seqs,
        watermark_blocks=int(settings.decode.watermark * num_blocks),
    )
    address = node.start()
    return Engine(
        core,
        node,
        address,
        num_blocks,
        settings.kv.block_size,
        max_model_len,
        str(dtype).removeprefix("torch."),
        str(device),
        torch.get_num_threads(),
    )
