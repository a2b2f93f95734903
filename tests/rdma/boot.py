"""What a guest is booted from: the distribution's kernel, and an initramfs of busybox, modules and an init.

Packages are downloaded and unpacked into a cache, never installed: no boot loader, no change of this machine.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MODULES: Final = (
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "crc32_generic",  # before rdma_rxe, which asks for it by the name of an algorithm only
    "dummy",
    "ib_uverbs",
    "rdma_rxe",
)
INIT: Final = """#!/busybox sh
b=/busybox
$b mkdir -p /proc /sys /dev /host /rw /new
$b mount -t proc proc /proc
for m in $($b cat /order); do $b insmod /modules/$m.ko || echo "guest: no module $m"; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=1048576 root /host || exec $b poweroff -f
$b mount -t tmpfs tmpfs /rw
$b mkdir -p /rw/up /rw/work
$b mount -t overlay -o lowerdir=/host,upperdir=/rw/up,workdir=/rw/work overlay /new
$b mount -t proc proc /new/proc
$b mount -t sysfs sysfs /new/sys
$b mount -t devtmpfs dev /new/dev
$b mkdir -p /new/dev/shm
$b mount -t tmpfs tmpfs /new/dev/shm
$b mount -t tmpfs tmpfs /new/run
$b chroot /new /bin/sh {script} {arguments}
echo "guest: exit $?"
$b poweroff -f
"""


def unpack(package: str, cache: Path) -> Path:
    """Folder with the files of a Debian package.

    Raises:
        OSError, subprocess.CalledProcessError: it cannot be downloaded or unpacked here.
    """
    folder = cache / package
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", package], cwd=cache, check=True, capture_output=True, timeout=300)
    archive = next(cache.glob(f"{package}_*.deb"))
    part = cache / f"{package}.part"
    subprocess.run(["dpkg-deb", "-x", archive, part], check=True, capture_output=True, timeout=300)
    part.rename(folder)
    archive.unlink()
    return folder


def kernel_package() -> str:
    """Of the distribution's current kernel. Raises as `unpack`."""
    command = ["apt-cache", "depends", "linux-image-amd64"]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    found = re.search(r"Depends: (linux-image-\S+)", said)
    if found is None:
        raise FileNotFoundError("apt-cache knows no linux-image-amd64; run apt-get update")
    return found[1]


def make_initramfs(kernel: Path, busybox: Path, *, script: Path, arguments: list[str]) -> bytes:
    """A newc archive. Its init runs `script` in the guest and powers off.

    Raises:
        FileNotFoundError: the kernel package lacks a module.
    """
    files = {path.stem.replace("-", "_"): path for path in kernel.rglob("*.ko")}
    order: list[str] = []
    for name in MODULES:
        _add_with_needs(name, files, order)
    init = INIT.format(script=script, arguments=" ".join(arguments))
    parts = [
        _entry("modules", stat.S_IFDIR | 0o755, b""),
        _entry("busybox", stat.S_IFREG | 0o755, busybox.read_bytes()),
        _entry("init", stat.S_IFREG | 0o755, init.encode()),
        _entry("order", stat.S_IFREG | 0o644, "\n".join(order).encode()),
        *(_entry(f"modules/{name}.ko", stat.S_IFREG | 0o644, files[name].read_bytes()) for name in order),
        _entry("TRAILER!!!", 0, b""),
    ]
    return b"".join(parts)


def _add_with_needs(name: str, files: dict[str, Path], order: list[str]) -> None:
    if name in order:
        return
    if name not in files:
        raise FileNotFoundError(f"the kernel package has no module {name}")
    for need in _needs(files[name]):
        _add_with_needs(need, files, order)
    order.append(name)


def _needs(module: Path) -> Iterator[str]:
    """Names in its `depends=`, with underscores."""
    found = re.search(rb"\0depends=([^\0]*)\0", module.read_bytes())
    yield from (name for name in (found[1].decode().split(",") if found else ()) if name)


def _entry(name: str, mode: int, data: bytes) -> bytes:
    """One file of a newc archive: hexadecimal fields, name and data padded to 4 bytes."""
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % value for value in fields) + name.encode() + b"\0"
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "celeriac" / "rdma"
