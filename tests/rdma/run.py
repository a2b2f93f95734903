"""`make test-rdma`: KV pages over real RDMA verbs without hardware. Some minutes, nearly all of it emulation.

Boots the distribution's kernel in qemu, emulated, with soft-RoCE (rdma_rxe); this machine's root file system is shared
with it read-only. In the guest `push_pages` runs over UCX's `rc`. Without qemu or packages: a line why, and success.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import util
from pathlib import Path
from typing import Final

from tests.rdma.boot import cache_folder, kernel_package, make_initramfs, unpack

ROOT: Final = Path(__file__).resolve().parents[2]
LIMIT_S: Final = 900.0
QEMU: Final = "qemu-system-x86_64"
NEEDED: Final = {
    QEMU: "qemu-system-x86",
    "/etc/libibverbs.d/rxe.driver": "ibverbs-providers",
    "/usr/bin/rdma": "iproute2",
}


def main() -> int:
    packages = _missing()
    if packages and os.geteuid() == 0 and shutil.which("apt-get"):
        _say(f"installing {' '.join(packages)}")
        command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
        subprocess.run(command, check=False, capture_output=True, timeout=LIMIT_S)
        packages = _missing()
    if packages:
        return _skip(f"not installed: {', '.join(packages)} (apt-get install {' '.join(packages)})")
    nixl = util.find_spec("nixl_cu12")
    if nixl is None or nixl.origin is None:
        return _skip("nixl-cu12 is not installed (pip install -e '.[rdma]')")
    try:
        kernel = unpack(kernel_package(), cache_folder())
        busybox = unpack("busybox-static", cache_folder()) / "bin" / "busybox"
    except (OSError, subprocess.SubprocessError, StopIteration) as error:
        return _skip(f"no kernel or busybox to boot: {error}")
    arguments = [sys.executable, str(ROOT), str(Path(nixl.origin).parents[1])]
    archive = make_initramfs(kernel, busybox, script=ROOT / "tests" / "rdma" / "guest.sh", arguments=arguments)
    with tempfile.TemporaryDirectory(prefix="celeriac-rdma-") as folder:
        initramfs = Path(folder) / "initramfs"
        initramfs.write_bytes(archive)
        return _boot(next((kernel / "boot").glob("vmlinuz-*")), initramfs)


def _missing() -> list[str]:
    return [package for name, package in NEEDED.items() if not (shutil.which(name) or Path(name).exists())]


def _boot(kernel: Path, initramfs: Path) -> int:
    """Runs qemu, passes the guest's own lines on, and judges by them."""
    command = [
        *("nice", QEMU, "-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", "2048"),
        *("-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio"),
        *("-kernel", str(kernel), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1 mitigations=off no_timer_check nowatchdog"),
        *("-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=root,mount_tag=root"),
    ]
    start_s = time.monotonic()
    _say("booting")
    is_passed, left_with = False, ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, errors="replace") as vm:
        signal.signal(signal.SIGALRM, lambda *_: vm.kill())  # only the process that is ours
        signal.alarm(int(LIMIT_S))
        assert vm.stdout is not None
        for line in vm.stdout:
            line = line.strip()
            if line:
                print(f"{time.monotonic() - start_s:6.1f} s  {line}", flush=True)
            is_passed = is_passed or line == "PASS"
            if line.startswith("guest: exit "):
                left_with = line.rpartition(" ")[2]
        vm.wait()
        signal.alarm(0)
    if is_passed and left_with == "0":
        _say(f"passed after {time.monotonic() - start_s:.0f} s")
        return 0
    what = f"left with {left_with}" if left_with else f"did not come to its end within {LIMIT_S:.0f} s, or has crashed"
    _say(f"FAILED: the guest {what}")
    return 1


def _say(text: str) -> None:
    print(f"test-rdma: {text}", flush=True)


def _skip(reason: str) -> int:
    _say(f"SKIPPED: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
