"""Settings that must fit each other. Each value is in its own range already."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from configs.errors import ConfigFault
from configs.schema import Settings

MIN_SECRET_BYTES = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_any_address(host: str) -> bool:
    """Whether one can listen there and nobody can dial it."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def relation_faults(settings: Settings, origins: Mapping[str, str]) -> list[ConfigFault]:
    """What does not fit, each at the setting that one would change."""
    found: list[ConfigFault] = []

    def fault(path: str, what: str, expected: str, hint: str = "") -> None:
        found.append(ConfigFault(origins.get(path, "default"), path, what, expected, hint))

    kv, gateway, flower = settings.kv, settings.gateway, settings.flower
    if kv.block_size & (kv.block_size - 1):
        fault("kv.block_size", f"{kv.block_size} is not a power of two", "such as 16 or 32")
    longest = settings.model.max_model_len
    if kv.num_blocks and longest > kv.num_blocks * kv.block_size:
        needed = -(-longest // kv.block_size)
        fault(
            "kv.num_blocks",
            f"one sequence of model.max_model_len={longest} tokens needs {needed} blocks of {kv.block_size}, "
            f"and a worker has {kv.num_blocks}",
            f"at least {needed}",
        )
    engine = settings.engine
    if engine.speculation_ngram_min > engine.speculation_ngram_max:
        fault(
            "engine.speculation_ngram_min",
            f"{engine.speculation_ngram_min} is more than engine.speculation_ngram_max={engine.speculation_ngram_max}",
            f"at most {engine.speculation_ngram_max}",
        )
    if kv.disk_cache_bytes and not kv.host_cache_bytes:
        fault(
            "kv.disk_cache_bytes",
            "blocks go to the disk and come back through host memory, and kv.host_cache_bytes is 0",
            "kv.host_cache_bytes of some blocks, such as 64MiB",
        )
    transfer = settings.transfer
    if is_any_address(transfer.bind_host) and not transfer.advertise_host:
        fault(
            "transfer.advertise_host",
            f"workers listen for KV on {transfer.bind_host}, which nobody can dial",
            "the address of this host that its peers reach",
        )
    if is_any_address(transfer.advertise_host):
        fault("transfer.advertise_host", f"{transfer.advertise_host} cannot be dialled", "an address of this host")
    for name in ("tls_certificate", "tls_key", "tls_ca"):
        is_given = bool(getattr(transfer, name))
        if transfer.tls == "on" and not is_given:
            fault(f"transfer.{name}", "is empty, and transfer.tls is on", "a PEM file")
        if transfer.tls == "off" and is_given:
            fault(f"transfer.{name}", "would not be used: transfer.tls is off", "transfer.tls=on, or no file")
    if flower.enabled and gateway.port and (gateway.host, gateway.port) == (flower.host, flower.port):
        fault("flower.port", f"{flower.port} is the gateway's port, too", "two different ports")
    if flower.enabled and not is_loopback(flower.host) and not flower.basic_auth:
        fault(
            "flower.host",
            f"Flower on {flower.host} without a password lets anybody there revoke tasks and stop workers",
            "a loopback address, or flower.basic_auth=user:password",
        )
    if kv.direct == "on" and transfer.protocol != "rdma":
        fault(
            "kv.direct",
            f"is on, and transfer.protocol is {transfer.protocol}",
            "transfer.protocol=rdma, or kv.direct=auto",
        )
    if kv.direct == "on" and kv.bounce_bytes:
        fault("kv.bounce_bytes", "would not be used: kv.direct is on", "0, or kv.direct=off")
    for role in ("prefill", "decode"):
        sizes = getattr(settings, role)
        if kv.direct == "on" and sizes.tensor_parallel_size > 1:
            fault(
                "kv.direct",
                f"{role}.tensor_parallel_size is {sizes.tensor_parallel_size}, and ranks share the KV region itself",
                "auto, or one rank",
            )
        if kv.bounce_bytes and sizes.tensor_parallel_size > 1:
            fault(
                "kv.bounce_bytes",
                f"{role}.tensor_parallel_size is {sizes.tensor_parallel_size}, and ranks share the KV region itself",
                "0, or one rank",
            )
        if sizes.max_num_batched_tokens < sizes.max_num_seqs and role == "decode":
            fault(
                "decode.max_num_batched_tokens",
                f"{sizes.max_num_batched_tokens} is below decode.max_num_seqs={sizes.max_num_seqs}",
                "room for one token of each sequence",
            )
    return found
