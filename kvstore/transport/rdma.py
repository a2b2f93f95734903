"""What this machine can do with RDMA: is NIXL installed, is there a device. Loads NIXL only when a node asks for it.

NIXL moves bytes over UCX: InfiniBand and RoCE where there is a device, else tcp, so that `rdma` also works (and is
tested) on a machine without one. Its Python module needs no torch.
"""

from __future__ import annotations

import importlib
import logging
import os
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Final

from kvstore.transport.errors import RdmaError
from kvstore.transport.memory import HOST, MemoryKind

logger = logging.getLogger(__name__)

PACKAGE: Final = "nixl-cu12"  # not `nixl`: the meta package brings both CUDA variants
DEVICES: Final = Path("/sys/class/infiniband")

# Transports of UCX with which a writer copies into our pages by itself, so that ending our side proves nothing.
COPIES_BY_THE_WRITER: Final = ("cma", "knem", "xpmem")


def nixl_version() -> str:
    """As peers compare it, such as `nixl-cu12 1.5.1`; "" where it is not installed. Two versions do not talk."""
    try:
        return f"{PACKAGE} {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        return ""


def device_names() -> list[str]:
    """RDMA devices that the kernel knows, software ones included."""
    try:
        return sorted(path.name for path in DEVICES.iterdir())
    except OSError:
        return []


def has_device() -> bool:
    return bool(device_names())


def usable_protocols(setting: str) -> tuple[str, ...]:
    """The transports behind a value of `transfer.protocol` on this machine, best first.

    `auto` is shm, rdma and tcp; rdma only where NIXL is installed and a device is there.

    Raises:
        RdmaError: `rdma` is asked for and NIXL is not installed.
    """
    if setting == "rdma" and not nixl_version():
        raise not_installed()
    if setting != "auto":
        return (setting,)
    if not has_device():
        return ("shm", "tcp")
    if not nixl_version():
        logger.warning("kv: an RDMA device is here, but not %s; tcp is used. Install celeriac[rdma].", PACKAGE)
        return ("shm", "tcp")
    return ("shm", "rdma", "tcp")


def not_installed() -> RdmaError:
    return RdmaError(reason="no_rdma", detail=f"{PACKAGE} is not installed here; install celeriac[rdma]")


def is_ended_by_us(kind: MemoryKind = HOST) -> bool:
    """True if nothing of a peer can land in our pages of this kind once our side of its link is destroyed.

    With RDMA our queue pair takes no more packets, over tcp only our own thread writes our pages. Memory of a GPU is
    also mapped by writers on this host, which copy by themselves (cuda_ipc, also over NVLink), unless UCX_TLS excludes
    it; memory of the host cannot be. And a value of UCX_TLS may allow more than what `load_nixl` allows. Then only the
    end of the writer's process is proof, as with shm.
    """
    value = os.environ.get("UCX_TLS", "")
    named = set(value.lstrip("^").split(","))
    if value.startswith("^"):
        is_mapped = kind.segment == "vram" and not named & {"cuda_ipc", "cuda"}
        return not is_mapped and named.issuperset(COPIES_BY_THE_WRITER)
    return bool(value) and not named & {*COPIES_BY_THE_WRITER, "cuda_ipc", "all", "sm", "shm", "cuda"}


def load_nixl() -> ModuleType:
    """NIXL's bindings. Sets what UCX must know before it is loaded, where the environment does not say it already.

    Raises:
        RdmaError: it is not installed, or its libraries cannot be loaded.
    """
    if not has_device():
        # Its modules for InfiniBand crash when the interpreter ends, and nobody needs them here.
        os.environ.setdefault("UCX_MODULES", "^ib,ib_mlx5")
    # All others may be used, so with memory of a GPU also cuda_copy and cuda_ipc.
    os.environ.setdefault("UCX_TLS", "^" + ",".join(COPIES_BY_THE_WRITER))
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # else it prints on stdout
    try:
        return importlib.import_module("nixl_cu12._bindings")
    except ModuleNotFoundError as error:
        raise not_installed() from error
    except ImportError as error:
        raise RdmaError(reason="no_rdma", detail=f"{PACKAGE} cannot be loaded: {error}") from error
