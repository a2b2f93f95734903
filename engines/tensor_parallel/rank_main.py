"""A rank process: loads its slice, maps the region, then computes the steps that rank 0 tells it, until EOF."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from engines.parent import end_with
from engines.tensor_parallel.step_message import LENGTH, RankStart, RankStep, read_exactly, read_frame


def main() -> None:
    sock_fd, parent_pid = int(sys.argv[1]), int(sys.argv[2])
    end_with(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=sock_fd)
    header, fds, _, _ = socket.recv_fds(sock, LENGTH.size, 1)
    (length,) = LENGTH.unpack(header)
    start = msgspec.msgpack.decode(read_exactly(sock, length), type=RankStart)
    if start.cpus:
        os.sched_setaffinity(0, start.cpus)
    with contextlib.suppress(EOFError, ConnectionError):
        _serve(sock, start, fds[0])
    sys.stderr.flush()
    os._exit(0)


def _serve(sock: socket.socket, start: RankStart, region_fd: int) -> None:
    import torch  # after the affinity is set

    from engines.factory import build_engine_model, choose_device, choose_dtype, choose_quantization
    from engines.kv_region import KVTensor
    from engines.models.llama import LlamaModel
    from engines.models.source import resolve_model
    from engines.runner import ForwardPass
    from engines.tensor_parallel.group import RankGroup
    from engines.tensor_parallel.ranks import Shard
    from kvstore.transport import KVRegion

    settings = start.config.settings
    role = settings.prefill if start.config.role == "prefill" else settings.decode
    torch.set_grad_enabled(False)
    torch.set_num_threads(max(1, len(start.cpus)))
    device = choose_device(role.device, num_ranks=start.num_ranks)
    dtype = choose_dtype(settings.model.dtype, device)
    group = RankGroup(Path(start.meeting_file), start.rank, start.num_ranks, device=device)
    model, config = build_engine_model(
        resolve_model(settings.model.path, settings.model.revision),
        dtype=dtype,
        device=device,
        linear=settings.engine.linear,
        kernels=settings.engine.kernels,
        deterministic=settings.engine.deterministic,
        quantization=choose_quantization(settings.engine.quantization, settings.engine.quantization_group),
        shard=Shard(start.rank, start.num_ranks, group.sum),
    )
    assert isinstance(model, LlamaModel)
    shared = KVRegion.attach(
        region_fd, num_blocks=start.num_blocks, num_layers=start.num_layers, layer_bytes=start.layer_bytes
    )
    region = KVTensor.over(shared, config, block_size=settings.kv.block_size, dtype=dtype)
    forward = ForwardPass(model, region.kv, device=device)
    sock.sendall(b"R")
    decoder = msgspec.msgpack.Decoder(RankStep)
    while True:
        step = decoder.decode(read_frame(sock))
        with torch.inference_mode():
            forward.begin(step.batch(), step.attention_rows())
            forward.compute()


if __name__ == "__main__":
    main()
