"""Ports of this machine: a free one instead of 0, and who holds one that is taken."""

from __future__ import annotations

import socket
from pathlib import Path


def free_port(host: str) -> int:
    """A port that is free now; somebody may take it before we do."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def port_problem(host: str, port: int) -> str:
    """Why nobody can listen there; "" if one can."""
    try:
        with socket.socket(_family(host)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except socket.gaierror:
        return f"the host name {host!r} does not resolve"
    except PermissionError:
        return f"port {port} needs privileges"
    except OSError as error:
        if error.errno == 99:  # EADDRNOTAVAIL
            return f"this machine has no address {host}"
        holder = holder_of(port)
        return f"port {port} on {host} is taken{f' by process {holder}' if holder else ''}"
    return ""


def holder_of(port: int) -> str:
    """ "1234 (nginx)": who listens on this port, if it can be seen."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[3] == "0A" and int(words[1].rsplit(":", 1)[1], 16) == port:
                inodes.add(f"socket:[{words[9]}]")
    if not inodes:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(str(link.readlink()) in inodes for link in (process / "fd").iterdir()):
                return f"{process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:
            continue
    return ""


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
