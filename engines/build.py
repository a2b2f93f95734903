"""Put an engine together from its config: model, KV region, pool, scheduler, KV node, core."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from configs import RotatingSecrets
from configs.schema import EngineSettings, Settings, TransferSettings
from engines.core import EngineCore
from engines.device_kv.make import make_port
from engines.device_kv.sizing import BounceSize, choose_direct
from engines.device_kv.staged_blocks import StagedBlocks
from engines.errors import ContextTooLong, DeviceUnavailable, PoolTooSmall
from engines.factory import build_engine_model, choose_device, choose_dtype, choose_quantization
from engines.finish import FinishRule
from engines.graphs.make import choose_graphs
from engines.kv_layout import compat_of, kv_layout, weights_form
from engines.kv_region import KVTensor
from engines.messages import EngineMessage, Repeatability
from engines.models.shape import ModelShape
from engines.models.source import resolve_model, weights_digest
from engines.prefix_share import PrefixSharing
from engines.process import EngineConfig
from engines.repeatability import repeatability_of
from engines.runner import ModelRunner
from engines.scheduler import DecodeScheduler, PrefillScheduler
from engines.scheduler.control import StepControl
from engines.scheduler.plan import StepPlan
from engines.scheduler.scheduler import Scheduler
from engines.speculation.proposer import NgramProposer
from engines.step_log import StepLog
from engines.step_timer import OFF, StepProfile, StepTimer, TimedScheduler, timed_send
from engines.structured.compiler import GrammarCompiler
from engines.structured.grammar import Vocabulary
from engines.swap import Ladder
from engines.swap.make import make_relief
from engines.tensor_parallel.parallel_engine import ParallelEngine
from kvstore.address import KVAddress
from kvstore.blocks import BlockPool, PrefixCache
from kvstore.clock import now_s
from kvstore.tiers import DiskTier, HostTier, TieredStore, TierError
from kvstore.transport import KVNode, KVPort, Times, TlsFiles, start_touching
from kvstore.transport.rdma import usable_protocols
from kvstore.transport.settings import host_id


@dataclass(frozen=True)
class Engine:
    """The parts that the process's main loop and its `Ready` message need."""

    core: EngineCore
    node: KVPort
    address: KVAddress
    num_blocks: int
    block_size: int
    max_model_len: int
    dtype: str
    device: str
    num_threads: int
    timer: StepTimer
    repeatability: Repeatability
    tiers: TieredStore | None = None
    parallel: ParallelEngine | None = None

    def close(self) -> None:
        """Stop what has threads: peers see the connections close, blocks on their way to the disk get there."""
        self.node.stop()
        if self.tiers is not None:
            self.tiers.close()
        if self.parallel is not None:
            self.parallel.close()


def build_engine(
    config: EngineConfig,
    send: Callable[[EngineMessage], None],
    *,
    post: Callable[[EngineMessage], bool] | None = None,
) -> Engine:
    """Load the weights and allocate the region; then listen for peers.

    `post` tells the front something from any thread, or leaves it to the engine's next turn (`FrontLink`). With it KV
    that has arrived is told while a step runs.

    Raises:
        EngineError: the model or the device cannot be used; the message says why.
    """
    settings = config.settings
    role = settings.prefill if config.role == "prefill" else settings.decode
    torch.set_grad_enabled(False)
    parallel = ParallelEngine(role.tensor_parallel_size) if role.tensor_parallel_size > 1 else None
    cpus = config.cpus if parallel is None else parallel.cpus(config)
    if cpus:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(len(cpus))
    device = choose_device(role.device, num_ranks=role.tensor_parallel_size)
    dtype = choose_dtype(settings.model.dtype, device)
    folder = resolve_model(settings.model.path, settings.model.revision)
    model, model_config = build_engine_model(
        folder,
        dtype=dtype,
        device=device,
        linear=settings.engine.linear,
        kernels=settings.engine.kernels,
        deterministic=settings.engine.deterministic,
        quantization=choose_quantization(settings.engine.quantization, settings.engine.quantization_group),
        shard=None if parallel is None else parallel.shard,
    )
    max_model_len = _context(settings.model.max_model_len, model_config)

    block_bytes = KVTensor.bytes_per_block(model_config, settings.kv.block_size, dtype)
    num_blocks = settings.kv.num_blocks or max(1, settings.kv.memory_bytes // block_bytes)
    if num_blocks * settings.kv.block_size < max_model_len:
        raise PoolTooSmall(
            num_blocks=num_blocks,
            block_size=settings.kv.block_size,
            block_bytes=block_bytes,
            max_model_len=max_model_len,
        )
    is_direct = choose_direct(
        settings.kv.direct,
        protocol=settings.transfer.protocol,
        device=device,
        bounce_bytes=settings.kv.bounce_bytes,
    )
    bounce = None
    if not is_direct:
        bounce = BounceSize.choose(
            settings.kv.bounce_bytes,
            device=device,
            block_bytes=block_bytes,
            block_size=settings.kv.block_size,
            max_model_len=max_model_len,
        )
    graphs = choose_graphs(settings.engine.cuda_graphs, device)
    region = KVTensor.create(
        model_config,
        num_blocks=num_blocks + (graphs is not None),  # one more for padding rows, which the pool does not have
        block_size=settings.kv.block_size,
        dtype=dtype,
        device=device,
        num_slots=0 if bounce is None else bounce.num_slots,
        is_direct=is_direct,
    )
    if not is_direct:
        start_touching(region.shared)
    if parallel is not None:
        if region.is_apart:
            raise DeviceUnavailable(
                asked=f"kv.{'direct' if is_direct else 'bounce_bytes'} with tensor_parallel_size={parallel.num_ranks}",
                why="ranks share the KV region itself",
                hint=f"Set `kv.{'direct: off' if is_direct else 'bounce_bytes: 0'}`, or one rank.",
            )
        parallel.start(config, region.shared, device=device)
    pool = BlockPool(num_blocks)
    digest = weights_digest(folder)
    cache = tiers = None
    if settings.kv.enable_prefix_caching:
        form = weights_form(settings.engine)
        fingerprint = page_fingerprint(f"{digest} {form}", model_config, settings.kv.block_size, str(dtype))
        tiers = _tiers(settings, config.node, region, fingerprint)
        cache = PrefixCache(pool, settings.kv.block_size, policy=settings.kv.eviction, tiers=tiers)
    node = make_port(
        KVNode(
            incarnation=config.incarnation,
            region=region.served,
            secret=RotatingSecrets(settings, config.secret),
            compat=compat_of(folder, digest, weights_form(settings.engine)),
            layout=kv_layout(model_config, settings, str(dtype).removeprefix("torch.")),
            protocols=usable_protocols(settings.transfer.protocol),
            run_dir=settings.run_dir,
            bind=settings.transfer.bind_host,
            advertise=settings.transfer.advertise_host,
            checksum=settings.transfer.checksum,
            tls=_tls_files(settings.transfer),
            link_gbps=settings.transfer.gbps,
            times=Times.with_leases(
                grant_lease_s=settings.transfer.grant_lease_s, fence_kill_s=settings.transfer.fence_kill_s
            ),
        ),
        region,
        bounce,
    )
    relief = make_relief(
        region.kv,
        pool,
        block_size=settings.kv.block_size,
        block_bytes=block_bytes,
        swap_bytes=0 if config.role == "prefill" else settings.kv.swap_bytes,
    )
    proposer = _proposer(settings.engine, model_config, max_model_len)
    control = StepControl.of(
        itl_slo_ms=settings.engine.itl_slo_ms,
        max_num_seqs=role.max_num_seqs,
        max_num_batched_tokens=role.max_num_batched_tokens,
    )
    scheduler = _scheduler(config.role, settings, pool, cache, relief.ladder, proposer, control)
    timer: StepTimer = OFF
    if profile := StepProfile.from_environment(config.incarnation):
        timer, scheduler, send = profile, TimedScheduler(scheduler, profile), timed_send(send, profile)
    tell_ranks = None if parallel is None else parallel.tell
    runner = ModelRunner(
        model,
        region,
        device=device,
        dtype=dtype,
        timer=timer,
        tell_ranks=tell_ranks,
        graphs=graphs,
        scratch_block=num_blocks,
    )
    step_log = StepLog.from_environment(config.incarnation)
    core = EngineCore(
        incarnation=config.incarnation,
        scheduler=scheduler,
        runner=runner,
        pool=pool,
        node=node,
        finish_rule=FinishRule(frozenset(model_config.eos_token_ids), max_model_len),
        relief=relief,
        grammars=GrammarCompiler(_vocabulary(folder, model_config), now_s),
        send=send,
        clock=now_s,
        block_size=settings.kv.block_size,
        block_bytes=block_bytes,
        layer_group_bytes=settings.transfer.layer_group_bytes,
        control=control,
        watermark_blocks=int(settings.decode.watermark * num_blocks),
        prefix_cache=cache,
        tiers=tiers,
        sharing=None
        if cache is None or not settings.kv.share_prefixes
        else PrefixSharing(
            node=node,
            pool=pool,
            cache=cache,
            incarnation=config.incarnation,
            host_id=host_id(),
            block_size=settings.kv.block_size,
            keeps=config.role == "prefill",
            send=send,
            clock=now_s,
        ),
        on_step=_on_step(step_log, profile),
    )
    if post is not None:
        node.divert(core.arrivals_told_by(post))
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
        timer,
        repeatability_of(model, num_ranks=role.tensor_parallel_size, compression=settings.transfer.compression),
        tiers,
        parallel,
    )


def _vocabulary(folder: Path, config: ModelShape) -> Vocabulary:
    return Vocabulary(folder / "tokenizer.json", config.vocab_size, tuple(config.eos_token_ids))


def _on_step(step_log: StepLog | None, profile: StepProfile | None) -> Callable[[StepPlan, float], None] | None:
    """Who is told of each step; nobody, mostly."""
    listeners = [*([profile.end_step] if profile else []), *([step_log.add] if step_log else [])]
    if len(listeners) < 2:
        return listeners[0] if listeners else None

    def tell_all(plan: StepPlan, elapsed_s: float) -> None:
        for listener in listeners:
            listener(plan, elapsed_s)

    return tell_all


def _tiers(settings: Settings, node: str, region: KVTensor, fingerprint: str) -> TieredStore | None:
    """What takes evicted blocks, or None.

    Raises:
        TierError: a size holds no block, or the folder cannot be used.
    """
    kv = settings.kv
    if not kv.host_cache_bytes:
        if kv.disk_cache_bytes:
            raise TierError(what="kv.disk_cache_bytes without kv.host_cache_bytes", expected="both, or none")
        return None
    disk, block_bytes = None, region.served.block_bytes
    if kv.disk_cache_bytes:
        folder = Path(kv.disk_cache_dir or Path(settings.run_dir) / "kv-cache") / node
        disk = DiskTier(folder, fingerprint=fingerprint, max_bytes=kv.disk_cache_bytes, block_bytes=block_bytes)
    host = HostTier(kv.host_cache_bytes, block_bytes)
    if not region.is_apart:
        return TieredStore(host, disk, pages=region.shared.block)
    staged = StagedBlocks(region.kv)
    return TieredStore(host, disk, pages=staged.read, landed=staged.write_back)


def _context(asked: int, config: ModelShape) -> int:
    if asked > config.max_position_embeddings:
        raise ContextTooLong(asked=asked, limit=config.max_position_embeddings)
    return asked or config.max_position_embeddings


def page_fingerprint(digest: str, config: ModelShape, block_size: int, dtype: str) -> str:
    """Equal on two lives of workers only if pages of one are pages of the other: weights, shapes, dtype, layout."""
    layout = "num_layers,2,num_kv_heads,block_size,head_dim"
    shape = (config.num_layers, config.num_kv_heads, block_size, config.head_dim)
    return str(xxhash.xxh3_128_hexdigest(repr((digest, layout, shape, dtype)).encode()))


def _proposer(engine: EngineSettings, config: ModelShape, max_model_len: int) -> NgramProposer | None:
    if engine.speculation == "off":
        return None
    return NgramProposer(
        max_draft_tokens=engine.speculation_tokens,
        min_ngram=engine.speculation_ngram_min,
        max_ngram=engine.speculation_ngram_max,
        end_token_ids=frozenset(config.eos_token_ids),
        max_model_len=max_model_len,
    )


def _tls_files(transfer: TransferSettings) -> TlsFiles | None:
    if transfer.tls == "off":
        return None
    return TlsFiles(transfer.tls_certificate, transfer.tls_key, transfer.tls_ca, transfer.tls_check_host)


def _scheduler(
    role: str,
    settings: Settings,
    pool: BlockPool,
    cache: PrefixCache | None,
    ladder: Ladder,
    proposer: NgramProposer | None,
    control: StepControl,
) -> Scheduler:
    if role == "prefill":
        return PrefillScheduler(
            pool,
            cache,
            settings.kv.block_size,
            max_batch_size=settings.prefill.max_batch_size,
            max_num_batched_tokens=settings.prefill.max_num_batched_tokens,
            target_utilization=settings.prefill.target_utilization,
            batch_wait_ms=settings.prefill.batch_wait_ms,
            batching=settings.prefill.batching,
            step_time=control.step_time,
            pressure=control.pressure,
        )
    return DecodeScheduler(
        pool,
        cache,
        settings.kv.block_size,
        max_num_seqs=settings.decode.max_num_seqs,
        max_num_batched_tokens=settings.decode.max_num_batched_tokens,
        watermark_blocks=int(settings.decode.watermark * pool.num_blocks),
        ladder=ladder,
        proposer=proposer,
        max_draft_seqs=settings.engine.speculation_max_seqs,
        limits=control.limits,
    )
