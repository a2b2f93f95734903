"""Two network namespaces and a cable between them. Needs root, iproute2 and nftables; leaves nothing behind.

namespace a: 10.213.7.1 ══ veth ══ namespace b: 10.213.7.2
"""

from __future__ import annotations

import os
import shutil
import subprocess

ADDRESSES = {"a": "10.213.7.1", "b": "10.213.7.2"}


def why_not() -> str:
    """Why there can be no namespaces here; empty: there can."""
    missing = [name for name in ("ip", "tc", "nft") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (iproute2, nftables)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"cel{os.getpid()}x"
    added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if added.returncode:
        return f"no network namespaces: {added.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return ""


class Network:
    """Use as a context. Sides are `a` and `b`."""

    def __init__(self) -> None:
        self._names = {side: f"cel{os.getpid()}{side}" for side in ADDRESSES}

    def __enter__(self) -> Network:
        try:
            for name in self._names.values():
                _run("ip", "netns", "add", name)
            near, far = self._names["a"], self._names["b"]
            _run("ip", "-n", near, "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", far)
            for side, name in self._names.items():
                _run("ip", "-n", name, "address", "add", f"{ADDRESSES[side]}/24", "dev", "cable")
                _run("ip", "-n", name, "link", "set", "cable", "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._names.values():  # the veth pair goes with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def command(self, side: str, *words: str) -> list[str]:
        """What runs `words` on a side; the process id is that of the program itself."""
        return ["ip", "netns", "exec", self._names[side], *words]

    def limit(self, side: str, rate: str) -> None:
        """What a side sends: such as `50mbit`."""
        qdisc = ("qdisc", "replace", "dev", "cable", "root", "tbf", "rate", rate, "burst", "16kb", "latency", "50ms")
        _run(*self.command(side, "tc", *qdisc))

    def drop(self, side: str, *, percent: int) -> None:
        """What comes in at a side: so much of it is lost."""
        rule = "drop" if percent == 100 else f"numgen random mod 100 < {percent} drop"
        table = f"table inet faults {{ chain incoming {{ type filter hook input priority 0; iif cable {rule}; }}; }}"
        _run(*self.command(side, "nft", table))

    def cut(self) -> None:
        """Pull the cable out."""
        _run("ip", "-n", self._names["a"], "link", "set", "cable", "down")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}"
