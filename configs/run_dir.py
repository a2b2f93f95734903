"""Where a local cluster keeps its things, and whether one runs there.

<run dir>/lock            held by flock for as long as the supervisor lives: a dead one's is free by itself
<run dir>/cluster.yaml    the settings of the running cluster, for every process of it and for hand-made workers
<run dir>/secret          the cluster secret, mode 0600
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path

CLUSTER_FILE = "cluster.yaml"
LOCK_FILE = "lock"
SECRET_FILE = "secret"


def default_run_dir(env: Mapping[str, str]) -> Path:
    """`$XDG_STATE_HOME/celeriac/default`, by default under `~/.local/state`."""
    state_home = env.get("XDG_STATE_HOME") or str(Path(env.get("HOME") or Path.home()) / ".local" / "state")
    return Path(state_home) / "celeriac" / "default"


def is_running(run_dir: Path) -> bool:
    """Whether a supervisor holds the lock of this folder."""
    try:
        fd = os.open(run_dir / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False
